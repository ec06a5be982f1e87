"""What management commands share."""

from django.core.management.base import CommandError
from django.utils.translation import gettext as _

from portal.models import User


def row_named(rows, wish: str):
    """The row among `rows` (an AccessQuerySet) of this name or number; CommandError naming what
    there is.
    """
    found = rows.named(wish)
    if found is None:
        known = ", ".join(rows.values_list("name", flat=True).order_by("name")[:20]) or "-"
        raise CommandError(
            _("There is no “%(name)s”. There are: %(known)s") % {"name": wish, "known": known}
        )
    return found


def user_named(username: str | None) -> User:
    """The active account of this name; without one, the first administrator. CommandError where
    there is none, saying what to do about it.
    """
    active = User.objects.filter(is_active=True).order_by("id")
    if username:
        user = active.filter(username=username).first()
        refusal = _("There is no active user named “%(name)s”.") % {"name": username}
    else:
        user = active.filter(is_superuser=True).first()
        refusal = _(
            "There is no administrator yet: `python manage.py createsuperuser` makes one, and so "
            "does the first `make up`."
        )
    if user is None:
        raise CommandError(refusal)
    return user
