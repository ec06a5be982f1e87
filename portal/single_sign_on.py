"""Logging in through the team's own provider (OpenID Connect), where PORTAL_OIDC_ISSUER is set.

mozilla-django-oidc goes the way there and back (code flow, state, nonce, PKCE). Here is what it
leaves open: the id token's audience, issuer and times, whose account it opens, and pages that say
why somebody is not let in.
"""

import logging
import time
from typing import Any

import jwt
import requests
from django.conf import settings
from django.contrib.auth.backends import ModelBackend
from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import SuspiciousOperation, ValidationError
from django.db import IntegrityError, transaction
from django.http import HttpResponseRedirect
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.decorators import method_decorator
from django.utils.http import urlencode
from django.utils.translation import gettext as _
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET
from mozilla_django_oidc import auth, utils, views

from portal import audit
from portal.login import LoginForm, forget_attempt, guessing
from portal.models import ExternalLogin, User

logger = logging.getLogger(__name__)

ALGORITHM = "RS256"  # which every provider has to have; never "none", never a shared secret
LEEWAY = 60  # seconds that the two clocks may differ
SESSION = 12 * 3600  # seconds; then the provider is asked again
KEPT = 3600.0  # seconds for which the provider's description is believed
ENDPOINTS = {
    "OIDC_OP_AUTHORIZATION_ENDPOINT": "authorization_endpoint",
    "OIDC_OP_TOKEN_ENDPOINT": "token_endpoint",
    "OIDC_OP_USER_ENDPOINT": "userinfo_endpoint",
    "OIDC_OP_JWKS_ENDPOINT": "jwks_uri",
}
_known: tuple[float, dict[str, Any]] = (0.0, {})


class Refused(Exception):
    """Nobody is let in. `told`: a sentence for the person, who may have written what came; the
    exception's own text is the log's.
    """

    def __init__(self, reason: str, told: str = ""):
        super().__init__(reason)
        self.told = told or _("The login was not accepted. Try again.")


def provider() -> dict[str, Any]:
    """The provider's description of itself (OpenID Connect Discovery). Raises Refused."""
    global _known
    when, found = _known
    if found and time.monotonic() - when < KEPT:
        return found
    address = f"{settings.OIDC_ISSUER.rstrip('/')}/.well-known/openid-configuration"
    away = _("The login service does not answer. Log in with a password, or try again later.")
    try:
        answer = requests.get(address, timeout=settings.OIDC_TIMEOUT)
        answer.raise_for_status()
        found = answer.json()
        if found["issuer"] != settings.OIDC_ISSUER:
            raise Refused(f"{address} speaks of the issuer {found['issuer']!r}", away)
        for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
            found[name]
    except (requests.RequestException, ValueError, KeyError, TypeError) as fault:
        raise Refused(f"{address}: {fault!r}", away) from fault
    _known = time.monotonic(), found
    return found


def _setting(name: str, *default):
    if name in ENDPOINTS:
        return provider().get(ENDPOINTS[name])
    if name == "OIDC_TOKEN_USE_BASIC_AUTH":
        ways = provider().get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        return "client_secret_post" not in ways
    return utils.import_from_settings(name, *default)


class Backend(auth.OIDCAuthenticationBackend):
    """Who a provider's code stands for. The library's own constructor would ask the provider, also
    for a password's login.
    """

    get_settings = staticmethod(_setting)
    get_user = ModelBackend.get_user  # knows who is deactivated

    def __init__(self):
        self.UserModel = User
        self.OIDC_RP_CLIENT_ID = settings.OIDC_RP_CLIENT_ID
        self.OIDC_RP_CLIENT_SECRET = settings.OIDC_RP_CLIENT_SECRET
        self.OIDC_RP_SIGN_ALGO = ALGORITHM
        self.OIDC_RP_IDP_SIGN_KEY = None

    def __getattr__(self, name: str):
        if name in ENDPOINTS:
            return _setting(name)
        raise AttributeError(name)

    def authenticate(self, request, nonce=None, code_verifier=None, **credentials):
        """A code is worth nothing without the nonce that this browser's way began with."""
        if not nonce or not code_verifier:
            return None
        return super().authenticate(
            request, nonce=nonce, code_verifier=code_verifier, **credentials
        )

    def get_payload_data(self, token, key):
        claims = jwt.decode(
            token,
            key,
            algorithms=[ALGORITHM],
            audience=self.OIDC_RP_CLIENT_ID,
            issuer=settings.OIDC_ISSUER,
            leeway=LEEWAY,
            options={"require": ["exp", "iat", "iss", "aud", "sub"]},
        )
        if claims.get("azp", self.OIDC_RP_CLIENT_ID) != self.OIDC_RP_CLIENT_ID:
            raise Refused(f"the token was made for {claims['azp']!r}")
        return claims

    def get_or_create_user(self, access_token, id_token, payload):
        claims = payload
        if provider().get("userinfo_endpoint") and access_token:
            told = self.get_userinfo(access_token, id_token, payload)
            if told.get("sub") != payload["sub"]:
                raise Refused("the provider told of somebody else")
            claims = {**told, **payload}  # what is signed counts
        return account_of(claims)


def account_of(claims: dict[str, Any]) -> User:
    """The account that `claims` open: the one they opened before (`sub`), else the one with their
    verified e-mail address, else a new one where PORTAL_OIDC_CREATE allows it. Raises Refused.
    """
    subject = claims["sub"]
    if not isinstance(subject, str) or not 0 < len(subject) <= 255:
        raise Refused(f"a subject that is none: {subject!r:.80}")
    admin = _is_admin(claims)
    login = {"issuer": settings.OIDC_ISSUER, "subject": subject}
    with transaction.atomic():
        known = ExternalLogin.objects.select_related("user").filter(**login).first()
        if known is not None:
            user = known.user
        else:
            user = _by_email(claims, admin) or _new(claims)
            ExternalLogin.objects.create(user=user, **login)
            audit.note(user, user, f"linked to {subject[:80]} of {settings.OIDC_ISSUER}")
        if not user.is_active:
            raise Refused(
                f"{user.username} is deactivated",
                _("This account is deactivated. Ask an administrator of this portal."),
            )
        if admin is not None and user.is_staff != admin:
            user.is_staff = user.is_superuser = admin
            user.save(update_fields=["is_staff", "is_superuser"])
            audit.note(user, user, f"administrator: {admin}, by {settings.OIDC_ADMIN_GROUP}")
    return user


def _is_admin(claims) -> bool | None:
    """Whether the provider makes this person an administrator; None: it has no say."""
    if not settings.OIDC_ADMIN_GROUP:
        return None
    groups = claims.get(settings.OIDC_GROUPS_CLAIM)
    return isinstance(groups, list) and settings.OIDC_ADMIN_GROUP in groups


def _verified_email(claims) -> str:
    email = claims.get("email")
    if claims.get("email_verified") not in (True, "true") or not isinstance(email, str):
        return ""
    return email if len(email) <= 254 and "@" in email else ""


def _by_email(claims, admin: bool | None) -> User | None:
    email = _verified_email(claims)
    # Beyond ASCII, other letters become the same when their case is overlooked.
    found = [
        user
        for user in (User.objects.filter(email__iexact=email) if email else ())
        if user.email == email
        or (email.isascii() and user.email.isascii() and user.email.lower() == email.lower())
    ]
    if len(found) > 1:
        raise Refused(
            f"{len(found)} accounts have the address {email}",
            _("Several accounts have your e-mail address. Ask an administrator of this portal."),
        )
    if not found:
        return None
    if (found[0].is_staff or found[0].is_superuser) and not admin:
        raise Refused(
            f"{found[0].username} is an administrator and is linked by no e-mail address",
            _("Administrators log in with their password here."),
        )
    return found[0]


def _new(claims) -> User:
    if not settings.OIDC_CREATE:
        raise Refused(
            f"no account for {claims.get('email')!r:.100}, verified: "
            f"{claims.get('email_verified')!r:.10}",
            _("There is no account for you in this portal yet. Ask an administrator for one."),
        )
    email = _verified_email(claims)
    user = User(username=_free_name(claims, email), email=email)
    for field, claim in (("first_name", "given_name"), ("last_name", "family_name")):
        value = claims.get(claim)
        if isinstance(value, str) and value.isprintable():
            setattr(user, field, value[:150])
    user.set_unusable_password()
    user.save()
    return user


def _free_name(claims, email: str) -> str:
    """A name that nobody has, by what the provider calls the person."""
    wish = claims.get("preferred_username")
    wish = wish if isinstance(wish, str) else ""
    for name in (wish, wish.partition("@")[0], email.partition("@")[0], "member"):
        try:
            User.username_validator(name[:140])
        except ValidationError:
            continue
        base = name[:140]
        break
    name, number = base, 2
    while User.objects.filter(username__iexact=name).exists():
        name, number = f"{base}-{number}", number + 1
    return name


# ---- pages


def _refused(request, fault: Exception):
    """The login page with the reason; the technical one goes into the log."""
    logger.warning("nobody was let in by the login service: %s", str(fault)[:500])
    told = fault.told if isinstance(fault, Refused) else Refused("").told
    return render(
        request,
        "portal/login.html",
        {"form": LoginForm(request), "refused": told, "sso_name": settings.OIDC_NAME},
        status=403,
    )


# What a provider's answer, or one that only looks like it, can lead to.
FAULTS = (
    Refused, SuspiciousOperation, IntegrityError, jwt.PyJWTError, requests.RequestException,
    ValueError, KeyError, TypeError, AttributeError,
)  # fmt: skip


@method_decorator([login_not_required, never_cache], name="dispatch")
class Begin(views.OIDCAuthenticationRequestView):
    """To the provider. Each beginning keeps a session, so an address has as many as the login has
    attempts.
    """

    get_settings = staticmethod(_setting)

    def __init__(self, **options):
        super(views.OIDCAuthenticationRequestView, self).__init__(**options)
        self.OIDC_RP_CLIENT_ID = settings.OIDC_RP_CLIENT_ID

    def get(self, request):
        if request.user.is_authenticated:
            return redirect(settings.LOGIN_REDIRECT_URL)
        try:
            guessing(request)
            self.OIDC_OP_AUTH_ENDPOINT = _setting("OIDC_OP_AUTHORIZATION_ENDPOINT")
        except ValidationError as paused:
            return _refused(request, Refused("too many attempts", " ".join(paused.messages)))
        except Refused as fault:
            return _refused(request, fault)
        return super().get(request)


@method_decorator([login_not_required, never_cache], name="dispatch")
class Callback(views.OIDCAuthenticationCallbackView):
    """Back from the provider."""

    get_settings = staticmethod(_setting)

    def get(self, request):
        if request.user.is_authenticated:  # nobody's login is changed by a link
            return redirect(settings.LOGIN_REDIRECT_URL)
        if "error" in request.GET:
            return _refused(request, Refused(f"the provider says {request.GET['error']!r:.80}"))
        try:
            return super().get(request)
        except FAULTS as fault:
            return _refused(request, fault)

    def login_success(self):
        answer = super().login_success()
        forget_attempt(self.request)
        self.request.session.set_expiry(SESSION)
        self.request.session["single_sign_on"] = True
        return answer

    def login_failure(self):
        return _refused(
            self.request,
            Refused("no login was begun in this browser, or no code came back"),
        )


@require_GET
@login_not_required
def leave(request):
    """Out of the provider too, for whoever wants that behind the portal's own logout."""
    try:
        address = provider().get("end_session_endpoint")
    except Refused as fault:
        return _refused(request, fault)
    if not address:
        return redirect("login")
    query = {
        "client_id": settings.OIDC_RP_CLIENT_ID,
        "post_logout_redirect_uri": request.build_absolute_uri(reverse("login")),
    }
    return HttpResponseRedirect(f"{address}?{urlencode(query)}")
