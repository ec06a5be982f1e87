"""The look of form fields, how refusals of the rules reach them, and the small forms of the account
page.
"""

from django import forms
from django.contrib.auth.forms import PasswordChangeForm as DjangoPasswordChangeForm
from django.core.exceptions import NON_FIELD_ERRORS
from django.utils.translation import gettext_lazy as _

from portal.login import guessing


class Styled:
    """Mixin: gives every widget the stylesheet's class; templates/portal/_field.html lays the field
    out.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for field in self.fields.values():
            if not isinstance(field.widget, (forms.CheckboxInput, forms.RadioSelect)):
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
