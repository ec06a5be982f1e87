"""What must hold of the ledger at any time, added up from its entries alone."""

from collections import Counter

from portal.budget.models import Account, Entry, Grant, Hold, Transaction

Of = Account.Kind


def check() -> None:
    """AssertionError when the books do not add up."""
    entries = list(
        Entry.objects.values_list(
            "transaction", "transaction__kind", "transaction__hold", "account__kind", "account",
            "grant", "amount",
        )
    )  # fmt: skip
    whose = dict(Grant.objects.values_list("pk", "account"))
    by_transaction, left, held, lapsed, used, by_hold = (Counter() for _ in range(6))
    for number, kind, hold, account_kind, account, grant, amount in entries:
        assert type(amount) is int and amount != 0
        by_transaction[number] += amount
        if hold is not None and account_kind == Of.HELD:
            by_hold[hold] += amount
        if grant is None:
            continue
        if account_kind == Of.BALANCE:
            left[grant] += amount
            # the units of a grant stay with whom it was given to
            assert account == whose[grant]
        elif account_kind == Of.HELD:
            held[grant] += amount
        elif account_kind == Of.USED:
            used[grant] += amount
        elif kind in ("lapse", "restore"):
            lapsed[grant] += amount
    assert set(by_transaction.values()) <= {0}
    assert sum(amount for *_rest, amount in entries) == 0
    assert set(by_transaction) >= set(
        Transaction.objects.exclude(kind__in=("hold", "settle")).values_list("pk", flat=True)
    )
    for grant in Grant.objects.all():
        kept = (grant.left, grant.held, grant.lapsed)
        assert kept == (left[grant.pk], held[grant.pk], lapsed[grant.pk]), grant
        assert min(kept) >= 0 and 0 <= used[grant.pk] <= grant.amount
        back = grant.amount - sum(kept) - used[grant.pk]  # withdrawn, returned
        assert back >= 0 if grant.closed_at else back == 0
    for hold in Hold.objects.all():
        assert by_hold[hold.pk] == (0 if hold.closed_at else hold.amount)
    reversed_once = Transaction.objects.exclude(reverses=None).values_list("reverses", flat=True)
    assert len(set(reversed_once)) == len(reversed_once)


def total(kind: str) -> int:
    return sum(Entry.objects.filter(account__kind=kind).values_list("amount", flat=True))
