"""The look of form fields, how refusals of the rules reach them, and the small forms of the account
page.
"""

from datetime import timedelta

from django import forms
from django.contrib.auth.forms import PasswordChangeForm as DjangoPasswordChangeForm
from django.core.exceptions import NON_FIELD_ERRORS
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from portal.login import guessing
from portal.models import ApiKey

MARKS = (forms.CheckboxInput, forms.RadioSelect, forms.CheckboxSelectMultiple)


class Styled:
    """Mixin: gives every widget the stylesheet's class; templates/portal/_field.html lays the field
    out.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for field in self.fields.values():
            if not isinstance(field.widget, MARKS):
                field.widget.attrs.setdefault("class", "input")


def add_errors(form, error) -> None:
    """Puts a ValidationError({field: ...}) of the rules at the form's own fields, what has no field
    there on top.
    """
    by_field = (
        error.error_dict if hasattr(error, "error_dict") else {NON_FIELD_ERRORS: error.error_list}
    )
    for field, problems in by_field.items():
        for problem in problems:
            form.add_error(field if field in form.fields else None, problem)


class KeyForm(Styled, forms.Form):
    name = forms.CharField(
        label=_("What is the key for?"),
        max_length=100,
        required=False,
        help_text=_("Only a reminder for you."),
    )
    scopes = forms.MultipleChoiceField(
        label=_("May be used for"),
        choices=ApiKey.Scope.choices,
        initial=list(ApiKey.Scope),
        widget=forms.CheckboxSelectMultiple,
        required=False,
    )
    days = forms.IntegerField(
        label=_("Valid for days"),
        min_value=1,
        max_value=3650,
        required=False,
        help_text=_("Empty: until it is revoked."),
    )
    requests_per_minute = forms.IntegerField(
        label=_("Requests a minute"), min_value=1, max_value=10**6, required=False
    )
    tokens_per_day = forms.IntegerField(
        label=_("Tokens a day"), min_value=1, max_value=10**9, required=False
    )

    def limits(self) -> dict:
        """What ApiKey.create_for takes. No scope chosen, as by a script that knows of none: all."""
        chosen = self.cleaned_data
        days = chosen["days"]
        return {
            "scopes": chosen["scopes"] or list(ApiKey.Scope),
            "expires_at": timezone.now() + timedelta(days=days) if days else None,
            "requests_per_minute": chosen["requests_per_minute"],
            "tokens_per_day": chosen["tokens_per_day"],
        }


class PasswordChangeForm(Styled, DjangoPasswordChangeForm):
    """Django's, without its autofocus: it stands among other things on the page. The old password
    may be guessed as often as at the login.
    """

    def __init__(self, *args, request=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.request = request
        self.fields["old_password"].widget.attrs.pop("autofocus", None)

    def clean_old_password(self):
        forget = guessing(self.request, f"account of {self.user.pk}")
        old = super().clean_old_password()
        forget()
        return old
