import json

from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _

from portal.explanations import explain
from tuning.explanations import EXPLANATIONS


class TuningConfig(AppConfig):
    name = "tuning"
    verbose_name = _("Tuning")

    def ready(self):
        from chat.conversations.turns import JUDGED
        from chat.registry import USES_OF_ADAPTERS
        from portal.runs.work import register
        from tuning.datasets.check_work import CheckWork
        from tuning.datasets.collecting import collect_better
        from tuning.work import TuningWork

        register(TuningWork)
        register(CheckWork)
        explain(EXPLANATIONS)
        USES_OF_ADAPTERS.append(_going_on_from)
        JUDGED.append(collect_better)


def _going_on_from(adapter) -> str | None:
    """What keeps an adapter from being deleted (chat.registry)."""
    from portal.models import Run
    from tuning.models import TuningRun

    active = TuningRun.objects.filter(status__in=Run.ACTIVE).values_list("recipe", flat=True)
    # at several places of a recipe: its own start, its variants'
    if any(adapter.sha256 in json.dumps(recipe) for recipe in active):
        return str(_("A tuning run goes on from this adapter. Wait for it or cancel it first."))
    return None
