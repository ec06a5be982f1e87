"""What Django itself answers when a view fails: a page for people, the error envelope for
scripts.
"""

from django.utils.translation import gettext as _
from django.views import defaults

from portal.rest.conventions import json_error


def server_error(request):
    if request.path_info.startswith(("/api/", "/v1/")):
        return json_error(
            500, _("A fault of the portal; its log says more."), code="internal_error"
        )
    return defaults.server_error(request)
