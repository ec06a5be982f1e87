from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _

from evaluation.explanations import EXPLANATIONS
from portal.explanations import explain


class EvaluationConfig(AppConfig):
    name = "evaluation"
    verbose_name = _("Evaluation")

    def ready(self):
        from evaluation.work import EvaluationWork
        from portal.runs.work import register

        register(EvaluationWork)
        explain(EXPLANATIONS)
