"""What one holder has: for the page, REST and their texts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from django.db.models import Q, QuerySet, Sum
from django.utils import timezone

from portal.budget import ledger
from portal.budget.models import Account, Entry, Grant, Hold, Transaction
from portal.models import Team

LAST = 20  # transactions that a statement shows


@dataclass(frozen=True)
class Line:
    """A transaction as its holder sees it; changes in micro-units."""

    transaction: Transaction
    balance: int
    held: int
    used: int


@dataclass(frozen=True)
class Statement:
    holder: ledger.Holder
    standing: ledger.Standing
    grants: list[Grant]  # valid ones, those that expire first go first
    holds: list[Hold]
    lines: list[Line]  # newest first

    @property
    def is_team(self) -> bool:
        return isinstance(self.holder, Team)


def is_nearly_spent(user) -> bool:
    """Whether the user has been warned; who has teams may still have theirs."""
    if not user.is_authenticated:
        return False
    mine = Account.objects.filter(user=user, kind=Account.Kind.BALANCE, warned=True)
    return mine.exists()


def _accounts(holder: ledger.Holder, prefix: str = "") -> Q:
    return Q(**{prefix + ("team" if isinstance(holder, Team) else "user"): holder})


def statement(holder: ledger.Holder, now: datetime | None = None) -> Statement:
    """Reads alone: who has no account yet has nothing."""
    now = now or timezone.now()
    grants = list(
        Grant.objects.filter(_accounts(holder, "account__"), ledger.valid(now))
        .select_related("account__user", "account__team", "by")
        .order_by("expires_at", "id")
    )
    standing = ledger.Standing(
        granted=sum(each.amount for each in grants),
        left=sum(each.left for each in grants),
        held=sum(each.held for each in grants),
        lapsed=sum(each.lapsed for each in grants),
    )
    holds = Hold.objects.filter(_accounts(holder, "payer__"), closed_at=None)
    return Statement(
        holder, standing, grants, list(holds.select_related("run").order_by("id")), _lines(holder)
    )


def _lines(holder: ledger.Holder) -> list[Line]:
    mine = Entry.objects.filter(_accounts(holder, "account__"))
    newest: QuerySet[Transaction] = Transaction.objects.filter(
        pk__in=mine.values("transaction")
    ).select_related("by")
    found = list(newest.order_by("-id")[:LAST])
    changes: dict[int, dict[str, int]] = {each.pk: {} for each in found}
    sums = mine.filter(transaction__in=found).order_by().values_list("transaction", "account__kind")
    for pk, kind, amount in sums.annotate(Sum("amount")):
        changes[pk][kind] = amount
    return [
        Line(
            each,
            changes[each.pk].get(str(Account.Kind.BALANCE), 0),
            changes[each.pk].get(str(Account.Kind.HELD), 0),
            changes[each.pk].get(str(Account.Kind.USED), 0),
        )
        for each in found
    ]
