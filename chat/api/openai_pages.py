"""Lists of /v1/: newest first, `limit` and `after` an id."""

from django.core.exceptions import ValidationError
from django.http import Http404, JsonResponse
from django.utils.translation import gettext as _

from portal.numbers import whole_number
from portal.rest.conventions import READABLE

LIMIT, MOST = 20, 100


def number_of(spelt: str, prefix: str) -> int:
    """The row's number in an id such as file-12; Http404."""
    number = whole_number(spelt.removeprefix(prefix))
    if number is None or not spelt.startswith(prefix):
        raise Http404
    return number


def listed(request, rows, prefix: str, told) -> JsonResponse:
    """A page of a queryset, each row as `told` says it."""
    limit, after = _limit(request), request.GET.get("after")
    ascending = request.GET.get("order") == "asc"
    if after:
        number = number_of(after, prefix)
        rows = rows.filter(**{"pk__gt" if ascending else "pk__lt": number})
    found = list(rows.order_by("pk" if ascending else "-pk")[: limit + 1])
    return page([told(row) for row in found[:limit]], len(found) > limit)


def listed_whole(request, entries: list[dict]) -> JsonResponse:
    """A page of what is already there, in its order."""
    limit, after = _limit(request), request.GET.get("after")
    start = next((i + 1 for i, entry in enumerate(entries) if entry["id"] == after), 0)
    return page(entries[start : start + limit], len(entries) > start + limit)


def page(entries: list[dict], has_more: bool) -> JsonResponse:
    ends = {"first_id": entries[0]["id"], "last_id": entries[-1]["id"]} if entries else {}
    body = {"object": "list", "data": entries, "has_more": has_more, **ends}
    return JsonResponse(body, json_dumps_params=READABLE)


def _limit(request) -> int:
    limit = whole_number(request.GET.get("limit") or LIMIT)
    if limit is None or limit < 1:
        message = _("Must be between %(least)s and %(most)s.") % {"least": 1, "most": MOST}
        raise ValidationError({"limit": ValidationError(message, "invalid_value")})
    return min(limit, MOST)
