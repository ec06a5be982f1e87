from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class BudgetConfig(AppConfig):
    name = "portal.budget"
    label = "budget"
    verbose_name = _("Budget")

    def ready(self):
        from portal.budget import holds
        from portal.explanations import explain

        holds.settle_before_deletion()
        explain(holds.EXPLANATIONS)
