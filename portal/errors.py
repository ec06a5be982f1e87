"""What Django itself answers when no view does: pages for people, the error envelope for scripts."""

from django.utils.translation import gettext as _
from django.views import defaults

from portal.api import json_error


def _is_scripts(request) -> bool:
    return request.path_info.startswith(("/api/", "/v1/"))


def not_found(request, exception):
    if _is_scripts(request):
        return json_error(404, _("Not found."), code="not_found")
    return defaults.page_not_found(request, exception)


def server_error(request):
    if _is_scripts(request):
        return json_error(500, _("A fault of the portal; its log says more."), code="internal_error")
    return defaults.server_error(request)
