"""What an admin may give: the rules for pages, admin and REST."""

from __future__ import annotations

from datetime import datetime, timedelta

from django.core.exceptions import ValidationError
from django.utils import timezone
from django.utils.formats import date_format
from django.utils.translation import gettext as _

from portal import audit
from portal.budget import ledger, pricing
from portal.budget.models import Account, Grant, Transaction
from portal.models import Team, User
from portal.text import is_storable

MOST_UNITS = 1_000_000_000  # of one grant
LONGEST = timedelta(days=3660)


def checked_units(units) -> int:
    """Whole units of one grant, in micro-units; ValidationError."""
    if isinstance(units, bool) or not isinstance(units, int):
        raise ValidationError(_("Units are given whole."), "not_whole")
    if not 1 <= units <= MOST_UNITS:
        message = _("Between 1 and %(most)s units can be given at once.")
        raise ValidationError(message % {"most": f"{MOST_UNITS:,}"}, "out_of_range")
    return units * pricing.MICRO


def checked_expiry(expires_at: datetime, now: datetime | None = None) -> datetime:
    now = now or timezone.now()
    if expires_at <= now:
        raise ValidationError(_("The units would have expired already."), "in_the_past")
    if expires_at > now + LONGEST:
        raise ValidationError(_("Units are given for ten years at most."), "too_far")
    return expires_at


def give(
    by: User, holder: ledger.Holder, units: int, expires_at: datetime, note: str = ""
) -> Grant:
    """ValidationError({field: ...}) with every problem."""
    problems: dict[str, ValidationError] = {}
    amount = 0
    try:
        amount = checked_units(units)
    except ValidationError as problem:
        problems["units"] = problem
    try:
        checked_expiry(expires_at)
    except ValidationError as problem:
        problems["expires_at"] = problem
    if not is_storable(note):
        problems["note"] = ValidationError(
            _("The text contains a NUL or half a character."), "invalid"
        )
    if problems:
        raise ValidationError(problems)
    made = ledger.grant(by, holder, amount, expires_at, note[:200])
    until = date_format(timezone.localtime(expires_at), "Y-m-d H:i")
    audit.note(by, made, f"budget: {units} units to {holder} until {until} {note}".strip())
    return made


def withdraw(by: User, grant: Grant) -> bool:
    """False when it had been withdrawn already."""
    left = grant.left
    done = ledger.withdraw(by, grant)
    if done:
        audit.note(by, grant, f"budget: withdrawn, {pricing.in_words(left)} units were left")
    return done


def refund(by: User, spent: Transaction) -> bool:
    """False when there is nothing to refund, or it has been refunded."""
    written = ledger.refund(by, spent)
    if written is not None:
        used = spent.entries.filter(account__kind=Account.Kind.USED)
        amount = sum(used.values_list("amount", flat=True))
        audit.note(by, spent, f"budget: {pricing.in_words(amount)} units refunded")
    return written is not None


def holder_named(user: str | None, team: str | None) -> ledger.Holder:
    """The one that is named; ValidationError({field: ...})."""
    if bool(user) == bool(team):
        raise ValidationError({"user": ValidationError(_("Name a user or a team."), "required")})
    field, name = ("user", user) if user else ("team", team)
    model, key = (User, "username") if user else (Team, "name")
    found = model.objects.filter(**{key: name}).first() if is_storable(name or "") else None
    if found is None:
        message = _("There is nobody of this name.") if user else _("There is no such team.")
        raise ValidationError({field: ValidationError(message, "does_not_exist")})
    return found
