"""The ledger's core: whatever happens in whichever order, the books add up."""

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest
from django.db import IntegrityError, connection, transaction
from django.utils import timezone
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from portal.budget import ledger, signals
from portal.budget.models import Account, Entry, Grant, Hold, NeverChanged, Transaction
from portal.models import Run, Team, User
from tests.portal.budget import books

NOW = timezone.make_aware(datetime(2026, 3, 1, 12))
DAY = timedelta(days=1)


def give(holder, amount, days=30, now=NOW):
    return ledger.grant(None, holder, amount, now + days * DAY, now=now)


def hold_of(holder, amount, now=NOW):
    user = holder if isinstance(holder, User) else User.objects.order_by("id").first()
    run = Run.objects.create(owner=user, kind="tuning", name="r")
    hold = Hold.objects.create(run=run, payer=ledger.account_of(holder), rate=1)
    ledger.reserve(hold, amount, now=now)
    return hold


amounts = st.integers(1, 1000)
who = st.integers(0, 2)
DONE = st.one_of(
    st.tuples(st.just("grant"), who, amounts, st.integers(1, 20)),
    st.tuples(st.just("hold"), who, amounts),
    st.tuples(st.just("extend"), st.integers(0, 5), amounts),
    st.tuples(st.just("settle"), st.integers(0, 5), st.integers(0, 1500)),
    st.tuples(st.just("charge"), who, amounts),
    st.tuples(st.just("refund"), st.integers(0, 8)),
    st.tuples(st.just("withdraw"), st.integers(0, 5)),
    st.tuples(st.just("clock"), st.integers(-15, 15)),
    st.tuples(st.just("delete"), who),
)


class Story:
    """Carries out what hypothesis draws, on two users and a team; keeps its own count of what has
    been used.
    """

    def __init__(self):
        users = [User.objects.create(username=name) for name in ("a", "b")]
        self.witness = User.objects.create(username="owner of runs")
        self.holders = [*users, Team.objects.create(name="t")]
        self.now, self.used = NOW, 0

    def grant(self, who, amount, days):
        if self.holders[who]:
            give(self.holders[who], amount, days, self.now)

    def hold(self, who, amount):
        if self.holders[who]:
            run = Run.objects.create(owner=self.witness, kind="tuning", name="r")
            payer = ledger.account_of(self.holders[who])
            hold = Hold.objects.create(run=run, payer=payer, rate=1)
            before = ledger.standing(payer, self.now).left
            assert ledger.reserve(hold, amount, now=self.now) == min(before, amount)

    def extend(self, index, amount):
        for hold in Hold.objects.filter(closed_at=None)[index : index + 1]:
            ledger.reserve(hold, amount, now=self.now)

    def settle(self, index, cost):
        for hold in Hold.objects.order_by("id")[index : index + 1]:
            first = hold.closed_at is None
            assert ledger.settle(hold, cost, now=self.now) is first
            assert ledger.settle(hold, cost, now=self.now) is False  # told twice
            self.used += cost if first else 0

    def charge(self, who, cost):
        payers = [holder for holder in (self.holders[who], self.holders[2]) if holder]
        if payers:
            ledger.charge(payers, cost, now=self.now)
            self.used += cost

    def refund(self, index):
        for spent in Transaction.objects.order_by("id")[index : index + 1]:
            before = books.total("used")
            ledger.refund(None, spent, now=self.now)
            self.used += books.total("used") - before
            assert ledger.refund(None, spent, now=self.now) is None

    def withdraw(self, index):
        for lot in Grant.objects.order_by("id")[index : index + 1]:
            ledger.withdraw(None, lot)

    def clock(self, days):
        self.now += days * DAY

    def delete(self, who):
        """What it has open costs nothing here: the runs have measured no time."""
        if self.holders[who]:
            self.holders[who].delete()
            self.holders[who] = None


def tell(story_of, steps):
    with transaction.atomic():
        story = story_of()
        for name, *details in steps:
            getattr(story, name)(*details)
            ledger.sweep(story.now)
            books.check()
            assert books.total("used") == story.used
            over = Grant.objects.filter(expires_at__lte=story.now)
            assert not over.filter(left__gt=0).exists()
            # what had lapsed while the clock was ahead is there again
            assert not Grant.objects.filter(ledger.valid(story.now), lapsed__gt=0).exists()
        transaction.set_rollback(True)


@pytest.mark.django_db
@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(
    [
        ("grant", 0, 500, 10),
        ("grant", 0, 300, 5),
        ("hold", 0, 600),
        ("clock", 15),
        ("clock", -15),
        ("extend", 0, 100),
        ("settle", 0, 400),
        ("refund", 4),
        ("grant", 2, 50, 20),
        ("charge", 0, 500),
        ("withdraw", 1),
        ("hold", 2, 40),
        ("delete", 0),
        ("settle", 1, 90),
        ("delete", 2),
    ]
)
@given(steps=st.lists(DONE, min_size=4, max_size=10))
def test_whatever_happens_the_books_add_up(steps):
    tell(Story, steps)


@pytest.mark.slow
@pytest.mark.django_db
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(DONE, min_size=10, max_size=40))
def test_long_stories_add_up(steps):
    tell(Story, steps)


@pytest.mark.django_db
def test_what_expires_first_is_used_first_whatever_was_given_first(member):
    late, early, soon = give(member, 100, 60), give(member, 100, 30), give(member, 100, 10)
    hold = hold_of(member, 150)
    ledger.settle(hold, 120, now=NOW)
    ledger.charge([member], 90, now=NOW)

    def left():
        return [Grant.objects.get(pk=grant.pk).left for grant in (soon, early, late)]

    assert left() == [0, 0, 90]
    assert ledger.sweep(NOW + 61 * DAY) == 1 and left() == [0, 0, 0]
    books.check()
    assert books.total("used") == 210 and books.total("pool") == -210


@pytest.mark.django_db
def test_a_hold_outlives_its_grant_and_the_rest_of_it_lapses(member):
    given = give(member, 100, 10)
    hold = hold_of(member, 80)
    ledger.sweep(NOW + 11 * DAY)
    given.refresh_from_db()
    assert (given.left, given.held, given.lapsed) == (0, 80, 20)
    ledger.settle(hold, 30, now=NOW + 11 * DAY)
    ledger.sweep(NOW + 11 * DAY)
    given.refresh_from_db()
    assert (given.left, given.held, given.lapsed) == (0, 0, 70)
    books.check()


@pytest.mark.django_db
def test_a_clock_that_ran_ahead_takes_nothing_for_good(member):
    give(member, 100, 10)
    ledger.sweep(NOW + 400 * DAY)
    assert ledger.left(member, NOW) == 0
    ledger.sweep(NOW)
    assert ledger.left(member, NOW) == 100
    kinds = Transaction.objects.order_by("id").values_list("kind", flat=True)
    assert list(kinds) == ["grant", "lapse", "restore"]
    books.check()


@pytest.mark.django_db
def test_what_runs_over_is_the_pools(member):
    give(member, 100)
    ledger.settle(hold_of(member, 60), 130, now=NOW)
    assert ledger.left(member, NOW) == 0
    over = Entry.objects.get(grant=None, account__kind="pool")
    assert over.amount == -30
    books.check()


@pytest.mark.django_db
def test_a_deleted_user_leaves_their_units_to_the_pool_and_the_history_readable(member, staff):
    given = ledger.grant(staff, member, 100, NOW + DAY, "for the course", NOW)
    ledger.charge([member], 40, about="chat", now=NOW)
    hold = hold_of(member, 25)
    member.delete()
    given.refresh_from_db()
    assert (given.left, given.held) == (0, 0) and given.closed_at is not None
    assert books.total("pool") == -40 and books.total("used") == 40
    hold.refresh_from_db()
    assert hold.closed_at is not None and hold.run is None
    written = [(each.kind, each.about) for each in Transaction.objects.order_by("id")]
    assert written[:2] == [("grant", "for the course"), ("charge", "chat")]
    assert written[-1][0] == "return"
    assert Account.objects.get(kind="used").name == "member"
    books.check()
    # somebody new of the same name begins with nothing
    again = User.objects.create(username="member")
    assert ledger.left(again, NOW) == 0 and ledger.account_of(again).pk != given.account_id


@pytest.mark.django_db
def test_a_withdrawn_grant_gives_back_what_is_held_when_it_is_free(member, staff):
    given = give(member, 100)
    hold = hold_of(member, 60)
    assert ledger.withdraw(staff, given) and not ledger.withdraw(staff, given)
    assert ledger.left(member, NOW) == 0
    ledger.settle(hold, 10, now=NOW)
    ledger.sweep(NOW)
    assert books.total("pool") == -10 and books.total("balance") == 0
    books.check()


@pytest.mark.django_db
def test_the_books_are_written_and_never_changed(member):
    give(member, 100)
    entry, written = Entry.objects.first(), Transaction.objects.first()
    entry.amount = 5
    for change in (
        entry.save,
        entry.delete,
        written.save,
        lambda: Entry.objects.all().delete(),
        lambda: Entry.objects.update(amount=5),
        lambda: Transaction.objects.update(kind="refund"),
    ):
        with pytest.raises(NeverChanged):
            change()
    with pytest.raises(IntegrityError), transaction.atomic():
        Grant.objects.update(left=-1)  # the database itself


@pytest.mark.django_db
@pytest.mark.parametrize("amounts", [(5, -4), (5,), (2.5, -2.5), (True, -1)])
def test_entries_that_do_not_sum_to_zero_are_not_written(member, amounts):
    balance = ledger.account_of(member)
    with pytest.raises(ledger.Unbalanced):
        ledger.post("grant", [(balance, None, amount) for amount in amounts])
    assert not Transaction.objects.exists()


@pytest.mark.django_db
def test_four_fifths_are_said_once_until_there_is_more(member, django_capture_on_commit_callbacks):
    heard = []

    def hear(account, percent, **signal):
        heard.append((account.user, percent))

    signals.nearly_spent.connect(hear)
    try:
        with django_capture_on_commit_callbacks(execute=True):
            give(member, 100)
            ledger.charge([member], 79, now=NOW)
        assert heard == []
        with django_capture_on_commit_callbacks(execute=True):
            ledger.charge([member], 1, now=NOW)
            ledger.charge([member], 5, now=NOW)
        assert heard == [(member, 80)]
        with django_capture_on_commit_callbacks(execute=True):
            give(member, 1000)
            ledger.charge([member], 900, now=NOW)
        assert heard == [(member, 80), (member, 89)]
    finally:
        signals.nearly_spent.disconnect(hear)


@pytest.mark.django_db(transaction=True)
@pytest.mark.skipif(
    "PORTAL_DATABASE_URL" not in os.environ, reason="SQLite in memory lets one thread write"
)
def test_eight_holds_at_once_take_no_unit_twice(member):
    given = give(member, 100)
    holds = [
        Hold.objects.create(
            run=Run.objects.create(owner=member, kind="tuning", name="r"),
            payer=given.account,
            rate=1,
        )
        for _ in range(8)
    ]

    def take(hold):
        try:
            return ledger.reserve(hold, 30, now=NOW)
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(take, holds))
    assert sorted(got) == [0, 0, 0, 0, 10, 30, 30, 30]
    books.check()
