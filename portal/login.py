"""Logging in, on the portal's page and in the admin: after too many wrong passwords a pause."""

import hashlib

from django.contrib.admin.forms import AdminAuthenticationForm
from django.contrib.auth.forms import AuthenticationForm
from django.core.cache import cache
from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

MOST_FAILURES = 10  # of one address for one username, before a pause
PAUSE = 300  # seconds, counted from the first of them


class Throttled:
    """Mixin of a login form. Counts per address and name, so that nobody locks a colleague out from
    elsewhere; an attempt is counted before the password is looked at, so that many at once gain
    nothing.
    """

    def clean(self):
        address, username = (
            self.request.META.get("REMOTE_ADDR", ""),
            self.cleaned_data.get("username", ""),
        )
        key = "login:" + hashlib.sha256(f"{address} {username}".encode()).hexdigest()
        cache.add(key, 0, PAUSE)
        if cache.incr(key) > MOST_FAILURES:
            message = _("Too many failed attempts. Try again in %(minutes)s minutes.")
            raise ValidationError(message % {"minutes": PAUSE // 60}, "too_many_attempts")
        cleaned = super().clean()
        # without a password Django asks nobody and finds nothing wrong here
        if self.get_user() is not None:
            cache.delete(key)
        return cleaned


class LoginForm(Throttled, AuthenticationForm):
    pass


class AdminLoginForm(Throttled, AdminAuthenticationForm):
    pass
