"""The ledger: every move of units is a transaction whose entries sum to zero, and nothing is ever
changed or deleted. Sums are whole micro-units.

Grants are spent in the order in which they expire. What a grant has left when it expires goes back
to the pool; what is held for a run then may still be used by that run. Expiry follows the clock in
both directions: what has lapsed while the clock was wrong is restored once it is right again.

Whoever moves units of a balance holds its row's lock (SQLite: there is one writer), so two holds at
once cannot take the same units; and the database lets no grant fall below zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from django.db import IntegrityError, transaction
from django.db.models import F, Q, Sum
from django.utils import timezone

from portal.budget import signals
from portal.budget.models import Account, Entry, Grant, Hold, Transaction
from portal.models import Team, User

Holder = User | Team
Line = tuple[Account, Grant | None, int]  # so much into the account (below zero: out of it)
Kind, Of = Transaction.Kind, Account.Kind


class Unbalanced(Exception):
    """Entries that do not sum to zero, or no whole numbers: a fault of ours, nothing is written."""


def pool() -> Account:
    return Account.objects.get_or_create(kind=Of.POOL)[0]


def account_of(holder: Holder, kind: str = Of.BALANCE) -> Account:
    """The holder's account, opened when it is first asked for."""
    whose = {"team" if isinstance(holder, Team) else "user": holder}
    return Account.objects.get_or_create(kind=kind, **whose, defaults={"name": str(holder)})[0]


def _beside(balance: Account, kind: str) -> Account:
    """Another account of the balance's owner, also of one who has gone."""
    if balance.user_id is None and balance.team_id is None:
        mine = Entry.objects.filter(grant__account=balance, account__kind=kind)
        found = Account.objects.filter(entries__in=mine).first()
        return found or Account.objects.create(kind=kind, name=balance.name)
    owner = {"user_id": balance.user_id, "team_id": balance.team_id}
    return Account.objects.get_or_create(kind=kind, **owner, defaults={"name": balance.name})[0]


def _locked(balance: Account) -> Account:
    return Account.objects.select_for_update().get(pk=balance.pk)


def post(
    kind: str,
    lines: Iterable[Line],
    *,
    by: User | None = None,
    hold: Hold | None = None,
    about: str = "",
    reverses: Transaction | None = None,
    at: datetime | None = None,
) -> Transaction:
    """Writes one transaction. Lines of nothing are left out. Raises Unbalanced."""
    lines = [line for line in lines if line[2] != 0]
    if any(type(amount) is not int for _account, _grant, amount in lines):
        raise Unbalanced("amounts are whole micro-units")
    if sum(amount for _account, _grant, amount in lines) != 0:
        raise Unbalanced("the entries do not sum to zero")
    with transaction.atomic():
        written = Transaction.objects.create(
            kind=kind,
            by=by,
            hold=hold,
            about=about[:200],
            reverses=reverses,
            at=at or timezone.now(),
        )
        Entry.objects.bulk_create(
            [
                Entry(transaction=written, account=account, grant=grant, amount=amount)
                for account, grant, amount in lines
            ]
        )
        for pk, sums in _by_grant(kind, lines).items():
            changes = {name: F(name) + amount for name, amount in sums.items() if amount}
            if changes:
                Grant.objects.filter(pk=pk).update(**changes)
    return written


def _by_grant(kind: str, lines: Iterable[Line]) -> dict[int, dict[str, int]]:
    """What a transaction adds to the sums that are kept with each grant."""
    found: dict[int, dict[str, int]] = {}
    for account, grant, amount in lines:
        if grant is None:
            continue
        sums = found.setdefault(grant.pk, {"left": 0, "held": 0, "lapsed": 0})
        if account.kind == Of.BALANCE:
            sums["left"] += amount
        elif account.kind == Of.HELD:
            sums["held"] += amount
        elif account.kind == Of.POOL and kind in (Kind.LAPSE, Kind.RESTORE):
            sums["lapsed"] += amount
    return found


# ------------------------------------------------------------------ what there is


@dataclass(frozen=True)
class Standing:
    """Of one balance, in micro-units."""

    granted: int  # by grants that are valid now
    left: int  # free to be used
    held: int
    lapsed: int = 0  # while the clock was ahead; the next sweep restores it

    @property
    def used(self) -> int:
        return self.granted - self.left - self.held - self.lapsed

    @property
    def percent(self) -> int:
        """Of what is valid, used."""
        return 100 * self.used // self.granted if self.granted else 0


def valid(now: datetime) -> Q:
    return Q(closed_at=None, expires_at__gt=now)


def standing(balance: Account, now: datetime | None = None) -> Standing:
    sums = balance.grants.filter(valid(now or timezone.now())).aggregate(
        granted=Sum("amount"), left=Sum("left"), held=Sum("held"), lapsed=Sum("lapsed")
    )
    return Standing(**{name: amount or 0 for name, amount in sums.items()})


def left(holder: Holder, now: datetime | None = None) -> int:
    """Free to be used, in micro-units."""
    whose = "account__team" if isinstance(holder, Team) else "account__user"
    grants = Grant.objects.filter(valid(now or timezone.now()), **{whose: holder})
    return grants.aggregate(left=Sum("left"))["left"] or 0


def _taken(balance: Account, most: int, now: datetime) -> list[tuple[Grant, int]]:
    """Up to `most` of what is left, of the grants that expire first."""
    found = []
    for grant in balance.grants.filter(valid(now), left__gt=0).order_by("expires_at", "id"):
        if most <= 0:
            break
        found.append((grant, min(most, grant.left)))
        most -= found[-1][1]
    return found


# ------------------------------------------------------------------ moves


@transaction.atomic
def grant(
    by: User | None,
    holder: Holder,
    amount: int,
    expires_at: datetime,
    note: str = "",
    now: datetime | None = None,
) -> Grant:
    """New units. What may be given is checked before (portal/budget/grants.py)."""
    now = now or timezone.now()
    balance = _locked(account_of(holder))
    made = Grant.objects.create(
        account=balance, amount=amount, expires_at=expires_at, note=note, by=by, created_at=now
    )
    lines: list[Line] = [(pool(), made, -amount), (balance, made, amount)]
    post(Kind.GRANT, lines, by=by, about=note, at=now)
    _watch(balance, now)
    made.refresh_from_db()
    return made


@transaction.atomic
def reserve(hold: Hold, most: int, *, about: str = "", now: datetime | None = None) -> int:
    """Sets up to `most` more aside for an open hold; returns how much there was."""
    now = now or timezone.now()
    balance = _locked(hold.payer)
    held = _beside(balance, Of.HELD)
    lines: list[Line] = []
    for lot, amount in _taken(balance, most, now):
        lines += [(balance, lot, -amount), (held, lot, amount)]
    got = sum(max(0, amount) for _account, _grant, amount in lines)
    if got:
        Hold.objects.filter(pk=hold.pk).update(amount=F("amount") + got)
        hold.amount += got
        post(Kind.HOLD, lines, hold=hold, about=about, at=now)
    return got


@transaction.atomic
def settle(hold: Hold, cost: int, *, about: str = "", now: datetime | None = None) -> bool:
    """Closes a hold: what the run has cost is used, the rest is free again. What it cost beyond
    the hold is taken from the balance, and from the pool where that has no more. False when it has
    been settled already.
    """
    now = now or timezone.now()
    balance = _locked(hold.payer)
    if not Hold.objects.filter(pk=hold.pk, closed_at=None).update(closed_at=now):
        return False
    held, used = _beside(balance, Of.HELD), _beside(balance, Of.USED)
    lines: list[Line] = []
    due = cost
    for lot, amount in _held_parts(hold):
        pays = min(due, amount)
        due -= pays
        lines += [(held, lot, -amount), (used, lot, pays), (balance, lot, amount - pays)]
    for lot, amount in _taken(balance, due, now):
        due -= amount
        lines += [(balance, lot, -amount), (used, lot, amount)]
    lines += [(pool(), None, -due), (used, None, due)]
    post(Kind.SETTLE, lines, hold=hold, about=about, at=now)
    _watch(balance, now)
    return True


def _held_parts(hold: Hold) -> list[tuple[Grant, int]]:
    """Of an open hold, what is set aside of each grant; those that expire first go first."""
    sums = dict(
        Entry.objects.filter(transaction__hold=hold, account__kind=Of.HELD)
        .values_list("grant")
        .annotate(Sum("amount"))
        .order_by()
    )
    lots = Grant.objects.filter(pk__in=sums).order_by("expires_at", "id")
    return [(lot, sums[lot.pk]) for lot in lots]


@transaction.atomic
def charge(
    holders: Sequence[Holder], cost: int, *, about: str = "", now: datetime | None = None
) -> Transaction | None:
    """Takes `cost` from the first holder that has it, in their order; what none has is the
    pool's.
    """
    now = now or timezone.now()
    due, paid = cost, []
    lines: list[Line] = []
    for holder in dict.fromkeys(holders):
        if due <= 0:
            break
        balance = _locked(account_of(holder))
        for lot, amount in _taken(balance, due, now):
            due -= amount
            lines += [(balance, lot, -amount), (_beside(balance, Of.USED), lot, amount)]
        paid.append(balance)
    lines += [(pool(), None, -due), (account_of(holders[0], Of.USED), None, due)] if due else []
    if not lines:
        return None
    written = post(Kind.CHARGE, lines, about=about, at=now)
    for balance in paid:
        _watch(balance, now)
    return written


@transaction.atomic
def refund(by: User | None, spent: Transaction, now: datetime | None = None) -> Transaction | None:
    """Gives back what a settlement or a charge has used, to the grants it came from. None when
    there is nothing to give back, or it has been given back.
    """
    now = now or timezone.now()
    if spent.kind not in (Kind.SETTLE, Kind.CHARGE):
        return None
    lines: list[Line] = []
    balances: dict[int, Account] = {}
    for entry in spent.entries.filter(account__kind=Of.USED).select_related(
        "account", "grant__account"
    ):
        back = entry.grant.account if entry.grant else pool()
        if entry.grant:
            balances[back.pk] = back
        lines += [(entry.account, entry.grant, -entry.amount), (back, entry.grant, entry.amount)]
    for pk in sorted(balances):
        _locked(balances[pk])
    if not lines:
        return None
    try:
        with transaction.atomic():
            written = post(Kind.REFUND, lines, by=by, about=f"#{spent.pk}", reverses=spent, at=now)
    except IntegrityError:  # by somebody else, or before
        return None
    for balance in balances.values():
        _watch(balance, now)
    return written


@transaction.atomic
def withdraw(by: User | None, given: Grant, kind: str = Kind.WITHDRAW) -> bool:
    """Takes a grant back as far as it is not used; what is held for runs follows when they end.
    False when that has been done already.
    """
    balance = _locked(given.account)
    if not Grant.objects.filter(pk=given.pk, closed_at=None).update(closed_at=timezone.now()):
        return False
    given.refresh_from_db()
    if given.left:
        post(kind, [(balance, given, -given.left), (pool(), given, given.left)], by=by)
    return True


def close(holder: Holder) -> None:
    """Before a user or a team is deleted: what they have left goes back to the pool. Open holds
    must have been settled (portal/budget/holds.py).
    """
    mine = Account.objects.filter(**{"team" if isinstance(holder, Team) else "user": holder})
    for given in Grant.objects.filter(account__in=mine, closed_at=None):
        withdraw(None, given, Kind.RETURN)
    mine.update(name=str(holder))


def sweep(now: datetime | None = None) -> int:
    """Has the grants follow the clock; returns how many moved. May be called at any time."""
    now = now or timezone.now()
    over = Grant.objects.filter(~valid(now), left__gt=0)
    early = Grant.objects.filter(valid(now), lapsed__gt=0)
    moved = 0
    for late, grants in ((True, over), (False, early)):
        for pk, account in list(grants.values_list("pk", "account")):
            with transaction.atomic():
                balance = Account.objects.select_for_update().get(pk=account)
                given = grants.filter(pk=pk).first()  # again, under the lock
                if given is None:
                    continue
                kind = Kind.LAPSE if late else Kind.RESTORE
                if given.closed_at is not None:
                    kind = Kind.WITHDRAW
                amount = given.left if late else -given.lapsed
                post(kind, [(balance, given, -amount), (pool(), given, amount)], at=now)
                _watch(balance, now)
                moved += 1
    return moved


def _watch(balance: Account, now: datetime) -> None:
    """Says once that most of a balance is used."""
    now_used = standing(balance, now).percent
    nearly = now_used >= signals.NEARLY
    if nearly == balance.warned:
        return
    Account.objects.filter(pk=balance.pk).update(warned=nearly)
    balance.warned = nearly
    if nearly:
        transaction.on_commit(
            lambda: signals.nearly_spent.send(Account, account=balance, percent=now_used)
        )
