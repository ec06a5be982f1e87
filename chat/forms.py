"""What the chat page sends: the text, the model chip, the sampling panel."""

from django import forms
from django.core.exceptions import ValidationError
from django.utils.translation import gettext_lazy as _

from chat.engine.request import DEFAULT_NEW_TOKENS, DEFAULTS, LIMITS
from chat.models import Adapter, Checkpoint, Conversation
from portal.forms import Styled
from portal.numbers import whole_number

# The sampling panel. A value that equals the default is not sent: the engine then makes the best of
# it, for instance gives the answer what the context has left, while an explicit wish that does not
# fit is refused.
PANEL = ("temperature", "top_p", "max_new_tokens", "seed", "prefix_strength")


def panel_of(checkpoint: Checkpoint | None) -> dict:
    """What the panel begins with: the engine's defaults, or what the checkpoint wishes in their
    place.
    """
    defaults = {**DEFAULTS, "max_new_tokens": DEFAULT_NEW_TOKENS}
    defaults |= checkpoint.sampling if checkpoint else {}
    return {name: defaults[name] for name in PANEL}


def chosen_model(user, value: str):
    """(checkpoint, adapter or None) that a chip's or an option's value names and `user` may see:
    `base-3` is checkpoint 3 with the prefix off, `adapter-7` adapter 7. None for an empty value;
    ValidationError when there is no such model.
    """
    if not value:
        return None
    kind, _dash, number = value.partition("-")
    pk = whole_number(number)
    if kind == "base" and pk is not None:
        found = Checkpoint.objects.visible_to(user).filter(pk=pk).first(), None
    elif kind == "adapter" and pk is not None:
        adapter = (
            Adapter.objects.visible_to(user).filter(pk=pk).select_related("checkpoint").first()
        )
        found = (adapter and adapter.checkpoint), adapter
    else:
        found = None, None
    if found[0] is None:
        raise ValidationError(_("This model is not there any more. Choose another."))
    return found


class SayForm(forms.Form):
    """One message; `model` is a chip's value, `models` are those of several whose answers are to be
    compared.
    """

    text = forms.CharField(label=_("Message"))  # what it may be is the turn's rule
    edited = forms.CharField(required=False)  # a question asked in another way
    model = forms.CharField(max_length=40, required=False)
    system = forms.CharField(required=False)
    # whether the model is shown the earlier turns; empty: as it was trained
    history = forms.TypedChoiceField(
        choices=[("", ""), ("yes", ""), ("no", "")],
        coerce=lambda value: value == "yes",
        empty_value=None,
        required=False,
    )

    # whether a model that can think before it answers does; empty: as its template has it
    thinking = forms.TypedChoiceField(
        choices=[("", ""), ("yes", ""), ("no", "")],
        coerce=lambda value: value == "yes",
        empty_value=None,
        required=False,
    )

    def __init__(self, data, *, user, needs_text=True):
        super().__init__(data)
        self.user = user
        self.fields["text"].required = needs_text
        for name in PANEL:  # their limits too are the turn's rule
            kind = forms.IntegerField if LIMITS[name].kind is int else forms.FloatField
            self.fields[name] = kind(required=False)

    def clean_model(self):
        return chosen_model(self.user, self.cleaned_data["model"])

    def clean(self):
        values = self.data.getlist("models") if hasattr(self.data, "getlist") else []
        models = [chosen_model(self.user, value) for value in values if value]
        self.cleaned_data["models"] = models if len(models) > 1 else []  # one is no comparison
        return self.cleaned_data

    def sampling(self) -> dict:
        """What the panel changed; absent keys keep the defaults."""
        model = self.cleaned_data.get("model")
        defaults = panel_of(model[0] if model else Checkpoint.default())
        chosen = {name: self.cleaned_data.get(name) for name in PANEL}
        found = {
            name: value for name, value in chosen.items() if value not in (None, defaults[name])
        }
        thinking = self.cleaned_data["thinking"]
        return found if thinking is None else {**found, "thinking": thinking}

    def asked(self) -> dict:
        """What `create_turn` takes besides the text."""
        checkpoint, adapter = self.cleaned_data.get("model") or (None, None)
        return {"checkpoint": checkpoint, "adapter": adapter, **self.told()}

    def told(self) -> dict:
        """What the models of one turn have in common."""
        return {
            "sampling": self.sampling(),
            "with_history": self.cleaned_data["history"],
            # a form without the field (no system prompt in this template) changes nothing
            "system": self.cleaned_data["system"] if "system" in self.data else None,
        }


class RenameForm(forms.ModelForm):
    class Meta:
        model = Conversation
        fields = ["title"]


class CheckpointForm(Styled, forms.Form):
    path = forms.CharField(label=_("Folder on the server"), max_length=500)
    name = forms.CharField(label=_("Name"), max_length=100, required=False)
