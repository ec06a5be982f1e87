"""The form of a new evaluation; what is allowed is said by evaluation/plan.py."""

from django import forms
from django.utils.translation import gettext_lazy as _

from chat.forms import chosen_model
from chat.models import Adapter, Checkpoint
from evaluation.models import EvaluationRun
from portal.forms import Styled
from tuning.models import Dataset


class EvaluationForm(Styled, forms.Form):
    model = forms.ChoiceField(label=_("Model"))
    dataset = forms.ModelChoiceField(
        Dataset.objects.none(),
        label=_("Dataset"),
        empty_label=None,
        help_text=_("Its validation rows are used; without any, the training rows."),
    )
    decoding = forms.ChoiceField(
        label=_("Decoding"),
        choices=EvaluationRun.Decoding.choices,
        help_text=_("Greedy is repeatable. Scores of different decodings cannot be compared."),
    )
    max_examples = forms.IntegerField(
        label=_("Rows at most"),
        required=False,
        help_text=_("Empty: all. Fewer are faster, with wider intervals."),
    )
    with_baseline = forms.BooleanField(
        label=_("Evaluate the base on the same rows too"), required=False, initial=True
    )

    def __init__(self, *args, user, **kwargs):
        super().__init__(*args, **kwargs)
        self.user = user
        self.fields["dataset"].queryset = Dataset.objects.visible_to(user)
        adapters = Adapter.objects.visible_to(user).select_related("checkpoint")
        self.fields["model"].choices = [
            (
                _("Tuned"),
                [(f"adapter-{row.pk}", f"{row.name} ({row.checkpoint.name})") for row in adapters],
            ),
            (
                _("Base"),
                [(f"base-{row.pk}", row.name) for row in Checkpoint.objects.visible_to(user)],
            ),
        ]

    def clean_model(self):
        return chosen_model(self.user, self.cleaned_data["model"])

    def plan(self) -> dict:
        """create_evaluation's arguments."""
        checkpoint, adapter = self.cleaned_data["model"]
        names = ("dataset", "decoding", "max_examples", "with_baseline")
        return {"checkpoint": checkpoint, "adapter": adapter} | {
            name: self.cleaned_data[name] for name in names
        }
