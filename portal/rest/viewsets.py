"""What the apps' REST views have in common."""

import contextlib

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _
from rest_framework import exceptions, viewsets
from rest_framework.fields import get_error_detail
from rest_framework.negotiation import BaseContentNegotiation

from portal.budget.holds import OverBudget
from portal.models import ApiKey
from portal.numbers import whole_number
from portal.runs.lifecycle import TooManyQueued


@contextlib.contextmanager
def rules_as_400():
    """Django's ValidationError, which the rules raise for every door, as DRF's; 429 when it is not
    the body that is wrong but the owner's number of waiting runs, or their budget.
    """
    try:
        yield
    except (TooManyQueued, OverBudget) as problem:
        refused = exceptions.Throttled(detail=problem.message, code=problem.code)
        refused.wait = getattr(problem, "wait", None)  # without DRF's own sentence of it
        raise refused from problem
    except ValidationError as problem:
        raise exceptions.ValidationError(get_error_detail(problem)) from problem


class AnyAccept(BaseContentNegotiation):
    """Whatever the client says it accepts: the answer is a file or a stream, and an error is
    JSON.
    """

    def select_parser(self, request, parsers):
        return parsers[0]

    def select_renderer(self, request, renderers, format_suffix=None):
        return renderers[0], renderers[0].media_type


class VisibleRows(viewsets.GenericViewSet):
    """Rows through the one funnel: what the user does not see is 404; what they see but may not
    change is 403.
    """

    key_scope = ApiKey.Scope.CHAT  # what a key must be good for

    def get_queryset(self):
        if getattr(self, "swagger_fake_view", False):
            return self.queryset
        return self.queryset.visible_to(self.request.user)

    def get_object(self):
        if whole_number(self.kwargs["pk"]) is None:  # not even an id
            raise exceptions.NotFound()
        return super().get_object()

    def number_wished(self, name: str) -> int | None:
        """The id in a list's query, None when none is named; 400 for what can be none."""
        wish = self.request.query_params.get(name)
        if not wish:
            return None
        number = whole_number(wish)
        if number is None:
            raise exceptions.ValidationError({name: [_("Must be a whole number.")]})
        return number

    def choice_wished(self, name: str, choices) -> str | None:
        """One of `choices` in a list's query, None when none is named; 400 for any other."""
        wish = self.request.query_params.get(name)
        if wish and wish not in choices:
            message = _("Must be one of: %(choices)s.") % {"choices": ", ".join(choices)}
            raise exceptions.ValidationError({name: [message]})
        return wish or None

    def check_changeable(self, row):
        """The row, when the user may change it."""
        if not type(row).objects.changeable_by(self.request.user).filter(pk=row.pk).exists():
            raise exceptions.PermissionDenied(_("Only the owner may change this."))
        return row

    def get_changeable(self):
        return self.check_changeable(self.get_object())
