"""Tokens of chat pages and programs: counted alike, limited alike, paid alike.

One answer costs what its prompt and its words have. It is refused before it begins when the day's
tokens or the units are used up; what is being written then is written to its end, and the pool pays
for what the payer has not.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta

from django.conf import settings
from django.db import DatabaseError, transaction
from django.db.models import F, Sum
from django.utils import timezone
from django.utils.translation import gettext as _

from portal.budget import ledger, pricing
from portal.budget.holds import OverBudget, payers
from portal.models import TokenUsage, User


def check(user_id: int) -> None:
    """Raises OverBudget when this person may not ask for another answer now."""
    if settings.TOKENS_PER_DAY and used_today(user_id) >= settings.TOKENS_PER_DAY:
        message = _("Your %(most)s tokens of today are used up.")
        told = {"most": f"{settings.TOKENS_PER_DAY:,}"}
        midnight = timezone.localtime().replace(hour=0, minute=0, second=0, microsecond=0)
        left = midnight + timedelta(days=1) - timezone.localtime()
        raise OverBudget(message % told, "insufficient_quota", wait=int(left.total_seconds()) + 1)
    if settings.TOKEN_RATE:
        user = User.objects.get(pk=user_id)
        if not any(ledger.left(holder) for holder in payers(user)):
            message = _("Your units are used up: an administrator gives more.")
            raise OverBudget(message, "insufficient_quota")


def used_today(user_id: int) -> int:
    """Read and written, by all ways."""
    today = TokenUsage.objects.filter(user=user_id, day=timezone.localdate())
    sums = today.aggregate(all=Sum(F("prompt_tokens") + F("completion_tokens")))
    return sums["all"] or 0


def count(user_id: int, door: str, model: str, prompt: int, completion: int) -> None:
    """Adds an ended answer to its person's day, and has it paid; both or none. Best effort: an
    answer is not lost for a database that does not take this. model: base or base:adapter.
    """
    with contextlib.suppress(DatabaseError), transaction.atomic():
        TokenUsage.count(user_id, door, model, prompt, completion)
        cost = pricing.of_tokens(prompt + completion, door)
        user = User.objects.filter(pk=user_id).first() if cost else None
        if user is not None:
            about = f"{prompt + completion} tokens, {door}, {model}"
            ledger.charge(payers(user), cost, about=about)
