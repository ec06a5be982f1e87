"""Guessing passwords, at the login, in the admin and at the account page's old password: after too
many wrong ones a pause (docs/adr/0015-login-pause.md).
"""

import contextlib
import hashlib
import ipaddress

from django.contrib.admin.forms import AdminAuthenticationForm
from django.contrib.auth.forms import AuthenticationForm
from django.core.cache import cache
from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

MOST_FAILURES = 10  # of one address for one username, before a pause
MOST_OF_ADDRESS = 100  # for all names together
PAUSE = 300  # seconds, counted from the first of them


def guessing(request, username: str | None = None):
    """Counts an attempt before the password is looked at, so that many at once gain nothing, and
    returns what forgets it when the password is right. ValidationError: there is a pause. Without
    a name (single sign-on, which keeps the password elsewhere) the address alone counts.

    Per address and name, so that nobody locks a colleague out from elsewhere; and per address, so
    that nobody tries one password on every name, or drowns the counters in names.
    """
    address = _network(request.META.get("REMOTE_ADDR", ""))
    counters = {_key(address): MOST_OF_ADDRESS}
    if username is not None:
        counters[_key(f"{address} {username}")] = MOST_FAILURES
    for key, most in counters.items():
        cache.add(key, 0, PAUSE)
        if cache.incr(key) > most:
            message = _("Too many failed attempts. Try again in %(minutes)s minutes.")
            raise ValidationError(message % {"minutes": PAUSE // 60}, "too_many_attempts")

    def forget() -> None:
        if username is not None:
            cache.delete(_key(f"{address} {username}"))
        forget_attempt(request)

    return forget


def forget_attempt(request) -> None:
    """Of the address alone, when a login of it succeeded."""
    with contextlib.suppress(ValueError):  # forgotten meanwhile, by its age
        cache.decr(_key(_network(request.META.get("REMOTE_ADDR", ""))))


def _network(address: str) -> str:
    """The address, or the network of an IPv6 one: a household has 2^64 of them."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    mapped = parsed.ipv4_mapped
    return str(mapped or ipaddress.ip_network((parsed, 64), strict=False))


def _key(text: str) -> str:
    return "login:" + hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


class Throttled:
    """Mixin of a login form."""

    def clean(self):
        username, password = map(self.cleaned_data.get, ("username", "password"))
        if not username or not password:  # the fields complain already; nothing was guessed
            return super().clean()
        forget = guessing(self.request, username)
        cleaned = super().clean()  # raises for a wrong password
        forget()
        return cleaned


class LoginForm(Throttled, AuthenticationForm):
    pass


class AdminLoginForm(Throttled, AdminAuthenticationForm):
    pass
