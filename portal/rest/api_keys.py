"""`Authorization: Bearer sk-...`, for DRF views, for plain (async) views and for websockets."""

import base64
import time
from importlib import import_module

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth import get_user
from django.core.cache import cache
from django.http import HttpRequest, parse_cookie
from django.utils.translation import gettext as _
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed, PermissionDenied, Throttled
from rest_framework.throttling import BaseThrottle

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


class KeyRefused(Exception):
    """A valid key may not do this, or not now. 403 or 429; `wait` in seconds."""

    def __init__(self, status: int, code: str, message: str, wait: int | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.wait = status, code, message, wait


def check_key(user, scope: str | None) -> None:
    """Raises KeyRefused unless the key that `user` came with (if any) has the scope, and requests
    and tokens left. Counts a request. The same at every door. Scope None: what anybody may read.
    """
    key = getattr(user, "api_key", None)
    if key is None:
        return
    if scope is not None and scope not in key.scopes:
        message = _("This key may not be used for: %(scope)s.")
        label = ApiKey.Scope(scope).label
        raise KeyRefused(403, "insufficient_scope", message % {"scope": label})
    if key.requests_per_minute is not None:
        now = time.time()
        counter = f"key:{key.pk}:{int(now // 60)}"
        cache.add(counter, 0, 120)
        if cache.incr(counter) > key.requests_per_minute:
            message = _("This key is good for %(most)s requests a minute.")
            wait = 60 - int(now % 60)
            raise KeyRefused(
                429, "rate_limit_exceeded", message % {"most": key.requests_per_minute}, wait
            )
    if scope == ApiKey.Scope.CHAT and key.tokens_left() == 0:
        message = _("This key has used up its %(most)s tokens of today.")
        raise KeyRefused(429, "insufficient_quota", message % {"most": key.tokens_per_day}, 3600)


class KeyLimits(BaseThrottle):
    """DRF's hook for `check_key`; a view says its scope by `key_scope`."""

    def allow_request(self, request, view):
        user = request.user
        if getattr(user, "api_key", None) is None:
            return True
        try:
            check_key(user, getattr(view, "key_scope", None))
        except KeyRefused as refusal:
            if refusal.status == 403:
                raise PermissionDenied(refusal.message, refusal.code) from refusal
            raise Throttled(refusal.wait, refusal.message, refusal.code) from refusal
        return True


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
