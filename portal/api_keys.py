"""`Authorization: Bearer sk-...`, for DRF views and for plain (async) views alike."""

from asgiref.sync import sync_to_async
from django.utils.translation import gettext as _
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed

from portal.models import ApiKey


def bearer(request) -> str | None:
    """The key of a request, or None when it has no bearer header."""
    scheme, _space, secret = request.headers.get("Authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" and secret.strip() else None


class BearerAuthentication(BaseAuthentication):
    def authenticate(self, request):
        secret = bearer(request)
        if secret is None:
            return None
        user = ApiKey.user_of(secret)
        if user is None:
            raise AuthenticationFailed(_("The API key is unknown or has been revoked."), code="invalid_api_key")
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
    """The user behind a key (or, with `session`, behind the login cookie) of an async view's request; None when there is none."""
    secret = bearer(request)
    if secret is not None:
        return await sync_to_async(ApiKey.user_of)(secret)
    if session:
        user = await request.auser()
        return user if user.is_authenticated else None
    return None
