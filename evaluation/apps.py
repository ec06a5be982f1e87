from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _

from evaluation.explanations import EXPLANATIONS
from portal.explanations import explain


class EvaluationConfig(AppConfig):
    name = "evaluation"
    verbose_name = _("Evaluation")

    def ready(self):
        from chat.registry import BEFORE_SHARING, USES_OF_ADAPTERS
        from evaluation.reviewing import needs_approval
        from evaluation.work import EvaluationWork
        from portal.runs.work import register

        register(EvaluationWork)
        explain(EXPLANATIONS)
        USES_OF_ADAPTERS.append(_evaluating)
        BEFORE_SHARING.append(needs_approval)


def _evaluating(adapter) -> str | None:
    """What keeps an adapter from being deleted (chat.registry)."""
    from portal.models import Run

    if adapter.evaluation_runs.filter(status__in=Run.ACTIVE).exists():
        return str(_("An evaluation is using this adapter. Wait for it or cancel it first."))
    return None
