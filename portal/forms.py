"""The look of form fields, and the small forms of the account page."""

from django import forms
from django.contrib.auth.forms import PasswordChangeForm as DjangoPasswordChangeForm
from django.utils.translation import gettext_lazy as _


class Styled:
    """Mixin: gives every widget the stylesheet's class; templates/portal/_field.html lays the field out."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for field in self.fields.values():
            if not isinstance(field.widget, (forms.CheckboxInput, forms.RadioSelect)):
                field.widget.attrs.setdefault("class", "input")


class KeyForm(Styled, forms.Form):
    name = forms.CharField(
        label=_("What is the key for?"), max_length=100, required=False, help_text=_("Only a reminder for you.")
    )


class PasswordChangeForm(Styled, DjangoPasswordChangeForm):
    pass
