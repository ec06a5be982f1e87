"""Which pages may open a websocket with the login cookie: the portal's own, as for its forms."""

import io

from channels.security.websocket import WebsocketDenier
from django.core.handlers.asgi import ASGIRequest
from django.middleware.csrf import CsrfViewMiddleware

_forms = CsrfViewMiddleware(lambda request: None)


class SameOrigin:
    """ASGI middleware: 403 unless the Origin is the Host's with its scheme and port, or one of
    PORTAL_TRUSTED_ORIGINS.

    A cookie is sent along from any port of the host, and a websocket has no CSRF token: the Origin
    is all there is to go by.
    """

    def __init__(self, application):
        self.application = application

    async def __call__(self, scope, receive, send):
        application = self.application if is_own(scope) else WebsocketDenier()
        return await application(scope, receive, send)


def is_own(scope) -> bool:
    scheme = scope.get("scheme", "ws").replace("ws", "http")
    try:
        request = ASGIRequest(
            {**scope, "type": "http", "method": "GET", "scheme": scheme}, io.BytesIO()
        )
    except UnicodeDecodeError:  # in the query
        return False
    return "HTTP_ORIGIN" in request.META and _forms._origin_verified(request)
