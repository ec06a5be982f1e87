"""What Django itself answers when a view fails: a page for people, the error envelope for
scripts.
"""

import sys

from django.http import HttpResponse
from django.template import loader
from django.utils.translation import gettext as _
from django.views import defaults

from portal.outages import RETRY_AFTER, outage_of
from portal.rest.conventions import json_error


def for_scripts(request) -> bool:
    """A program asks: it sends a key or JSON, or the address is one of theirs."""
    return (
        request.path_info.startswith(("/api/", "/v1/"))
        or "Authorization" in request.headers
        or request.content_type == "application/json"
    )


def not_found(request, exception):
    if for_scripts(request):
        message = _("There is no such interface; /api/docs/ lists what there is.")
        return json_error(404, message, code="not_found")
    return defaults.page_not_found(request, exception)


def server_error(request):
    outage = outage_of(sys.exception())
    if outage is not None:
        headers = {"Retry-After": str(RETRY_AFTER)}
        if for_scripts(request):
            return json_error(outage.status, outage.message, code=outage.code, headers=headers)
        # without a request: what every page shows comes from the database
        page = loader.render_to_string("outage.html", {"outage": outage})
        return HttpResponse(page, status=outage.status, headers=headers)
    if for_scripts(request):
        return json_error(
            500, _("A fault of the portal; its log says more."), code="internal_error"
        )
    return defaults.server_error(request)
