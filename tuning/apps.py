from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _

from portal.explanations import explain
from tuning.explanations import EXPLANATIONS


class TuningConfig(AppConfig):
    name = "tuning"
    verbose_name = _("Tuning")

    def ready(self):
        from portal.runs.work import register
        from tuning.datasets.check_work import CheckWork
        from tuning.work import TuningWork

        register(TuningWork)
        register(CheckWork)
        explain(EXPLANATIONS)
