"""`Authorization: Bearer sk-...`, for DRF views, for plain (async) views and for websockets."""

from importlib import import_module

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth import get_user
from django.http import HttpRequest, parse_cookie
from django.utils.translation import gettext as _
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed

from portal.models import ApiKey


def bearer(authorization: str) -> str | None:
    """The key in an Authorization header, or None when it holds no bearer key."""
    scheme, _space, secret = authorization.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" and secret.strip() else None


class BearerAuthentication(BaseAuthentication):
    def authenticate(self, request):
        secret = bearer(request.headers.get("Authorization", ""))
        if secret is None:
            return None
        user = ApiKey.user_of(secret)
        if user is None:
            raise AuthenticationFailed(
                _("The API key is unknown or has been revoked."), code="invalid_api_key"
            )
        return user, secret

    def authenticate_header(self, request):
        return "Bearer"


class BearerScheme(OpenApiAuthenticationExtension):
    """How the key is described in the OpenAPI schema."""

    target_class = BearerAuthentication
    name = "apiKey"

    def get_security_definition(self, auto_schema):
        return {"type": "http", "scheme": "bearer"}


async def user_of_request(request, *, session: bool = False):
    """The user behind a key (or, with `session`, behind the login cookie) of an async view's
    request; None when there is none.
    """
    secret = bearer(request.headers.get("Authorization", ""))
    if secret is not None:
        return await sync_to_async(ApiKey.user_of)(secret)
    if session:
        user = await request.auser()
        return user if user.is_authenticated else None
    return None


def user_of_scope(scope):
    """The user behind the key, or else behind the login cookie, of an ASGI scope; None when there
    is none. Asks the database."""
    headers = dict(scope["headers"])
    secret = bearer(headers.get(b"authorization", b"").decode("latin-1"))
    if secret is not None:
        return ApiKey.user_of(secret)
    cookies = parse_cookie(headers.get(b"cookie", b"").decode("latin-1"))
    request = HttpRequest()
    request.session = import_module(settings.SESSION_ENGINE).SessionStore(
        cookies.get(settings.SESSION_COOKIE_NAME)
    )
    user = get_user(request)
    return user if user.is_authenticated else None


def key_first(sockets, *, without_key):
    """An ASGI application: `sockets` with the user of the key (None: unknown) as scope["user"];
    `without_key` where none was sent.

    A page cannot make a browser send the header, so unlike the cookie it needs no check of where
    the page came from.
    """

    async def application(scope, receive, send):
        authorization = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        secret = bearer(authorization)
        if secret is None:
            return await without_key(scope, receive, send)
        user = await sync_to_async(ApiKey.user_of)(secret)
        return await sockets({**scope, "user": user}, receive, send)

    return application
