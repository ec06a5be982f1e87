"""What management commands share."""

from django.core.management.base import CommandError
from django.utils.translation import gettext as _


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
