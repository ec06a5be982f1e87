"""`Authorization: Bearer sk-...`, for DRF views, for plain (async) views and for websockets."""

import base64

from asgiref.sync import sync_to_async
from django.conf import settings
from django.utils.translation import gettext as _
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed

from portal.models import ApiKey


def bearer(authorization: str) -> str | None:
    """The key in an Authorization header, or None when it holds none. With
    PORTAL_KEY_IN_ADDRESS also that of `http://:KEY@host`, which clients send as Basic.
    """
    scheme, _space, secret = authorization.partition(" ")
    scheme, secret = scheme.lower(), secret.strip()
    if scheme == "basic" and settings.KEY_IN_ADDRESS:
        try:
            user, _colon, password = base64.b64decode(secret, validate=True).decode().partition(":")
        except ValueError:
            return None
        return password or user or None
    return secret if scheme == "bearer" and secret else None


def why_no_key(authorization: str) -> str:
    """What to tell somebody whose Authorization header lets nobody in."""
    if bearer(authorization) is not None:
        return _("The API key is unknown or has been revoked.")
    if not authorization:
        return _("Send a key of yours: Authorization: Bearer KEY. The account page makes one.")
    return _("The Authorization header must be: Bearer KEY. The account page makes a key.")


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
