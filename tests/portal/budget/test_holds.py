"""The budget of runs: held before they wait, settled by measured time when they end, however."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from django.contrib.admin.models import LogEntry
from django.utils import timezone
from rest_framework.test import APIClient

from portal.budget import holds, ledger, meter, pricing, signals
from portal.budget.meter import Meter
from portal.budget.models import DeviceUse, Hold, Transaction
from portal.budget.pricing import MICRO
from portal.devices.declared import Declared
from portal.models import Run, Team
from portal.runs import heartbeat, lifecycle
from portal.runs.heartbeat import CANCEL, Heartbeat
from tests.portal.budget import books
from tests.support.page_fixtures import *  # noqa: F403  a member's rows

pytestmark = pytest.mark.django_db
PLAN = {
    "checkpoint": {"name": "base"},
    "max_steps": 10,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
}
TEN_AN_HOUR = {"": 10 * MICRO}


@pytest.fixture(autouse=True)
def priced(settings):
    settings.DEVICE_RATES = TEN_AN_HOUR
    settings.DEVICE = "cuda"


@pytest.fixture
def clock(monkeypatch):
    """The monotonic time that meters see, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(meter, "time", SimpleNamespace(monotonic=lambda: now[0]))
    # beats are told from the test's own thread here, whose connection is in the test's transaction
    monkeypatch.setattr(heartbeat, "close_old_connections", lambda: None)
    return now


def give(holder, units, days=90):
    return ledger.grant(None, holder, units * MICRO, timezone.now() + timedelta(days=days))


def new_run(owner, **fields) -> Run:
    return Run(**{"owner": owner, "kind": "tuning", "name": "r", "recipe": PLAN, **fields})


def queued(owner, **fields) -> Run:
    run = new_run(owner, **fields)
    lifecycle.enqueue(run, ring_bell=False)
    return run


def measured(owner, seconds, steps=10):
    """Something to estimate from."""
    ended = timezone.now()
    Run.objects.create(
        owner=owner,
        kind="tuning",
        name="earlier",
        status="succeeded",
        recipe={**PLAN, "max_steps": steps},
        started_at=ended - timedelta(seconds=seconds),
        finished_at=ended,
    )


def works(run, clock, *seconds, phase="training", failing=()) -> str:
    """An attempt whose process beats after each of these times; `failing`: the indices of beats
    that the database did not take. Returns its token.
    """
    token = lifecycle.claim(run.pk)
    process = Heartbeat(run.pk, token, print, Meter(run))
    for index, passed in enumerate(seconds):
        clock[0] += passed
        process.tell(phase=phase)
        if index in failing:
            process._meter.write(phase)  # and its transaction is rolled back
            DeviceUse.objects.filter(run=run).delete()
        else:
            process._beat()
    run.heart = process
    return token


def free(holder):
    return ledger.left(holder) / MICRO


def settled() -> list[float]:
    return [
        -sum(e.amount for e in each.entries.all() if e.account.kind != "used") / MICRO
        for each in Transaction.objects.filter(kind="settle").order_by("id")
    ]


# ------------------------------------------------------------------ holding


def test_without_a_rate_nothing_is_held_and_nothing_written(settings, member):
    settings.DEVICE_RATES = {}
    run = queued(member)
    lifecycle.succeed(run.pk, lifecycle.claim(run.pk))
    assert not Hold.objects.exists() and not Transaction.objects.exists()


def test_the_estimate_is_held_before_a_run_waits(member):
    measured(member, seconds=1800)
    give(member, 100)
    queued(member, recipe={**PLAN, "max_steps": 20})
    hold = Hold.objects.get()
    assert hold.amount == pytest.approx(10 * MICRO, abs=MICRO / 1000) and free(member) == 90
    books.check()


def test_a_run_of_unknown_speed_holds_an_hour_or_what_there_is(member, other_member):
    give(member, 100), give(other_member, 3)
    queued(member), queued(other_member)
    assert (free(member), free(other_member)) == (90, 0)


def test_a_run_that_nobody_can_pay_is_refused_and_not_there(member):
    with pytest.raises(holds.OverBudget, match=r"没有|no units"):
        queued(member)
    measured(member, seconds=3600)
    give(member, 5)
    with pytest.raises(holds.OverBudget) as refused:
        queued(member)
    assert "10" in refused.value.message and "5" in refused.value.message
    assert not Run.objects.filter(status="queued").exists() and not Hold.objects.exists()
    books.check()


def test_the_refusal_reaches_scripts_and_pages(client, member, dataset, checkpoint):
    body = {"dataset": dataset.pk, "checkpoint": checkpoint.pk, "max_steps": 3}
    api = APIClient()
    api.force_authenticate(member)
    answer = api.post("/api/v1/tuning-runs/", body, format="json")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (429, "budget_too_small")
    client.force_login(member)
    form = {"dataset": dataset.pk, "model": f"base-{checkpoint.pk}", "split": "train"}
    page = client.post("/evaluations/new/", {**form, "decoding": "greedy"})
    assert page.status_code == 200 and "没有可用于此任务的算力点" in page.content.decode()
    assert not Run.objects.exists()


def test_a_team_pays_for_whom_has_not_enough(member, other_member):
    team = Team.objects.create(name="team")
    team.members.add(member, other_member)
    give(team, 100), give(other_member, 100)
    queued(member), queued(other_member)
    assert (free(team), free(other_member)) == (90, 90)


def test_a_kind_of_device_may_have_its_own_rate_and_downloads_are_free(settings, member):
    settings.DEVICE_RATES, settings.DEVICE = {"": 10 * MICRO, "cpu": MICRO}, "cpu"
    give(member, 100)
    queued(member)
    assert free(member) == 99
    queued(member, kind="fetch", recipe={})
    assert free(member) == 99


def test_a_waiting_run_that_is_cancelled_costs_nothing(member):
    give(member, 100)
    lifecycle.cancel(queued(member))
    assert free(member) == 100 and settled() == [0]
    books.check()


# ------------------------------------------------------------------ settling


def test_measured_device_time_is_what_is_paid(member, clock):
    give(member, 100)
    run = queued(member)
    token = works(run, clock, 900, 900)
    lifecycle.succeed(run.pk, token)
    assert settled() == [5] and free(member) == 95
    use = DeviceUse.objects.get()
    assert (use.milliseconds, use.user, use.model) == (1_800_000, member, "base:r")
    with pytest.raises(lifecycle.FencedOff):
        lifecycle.succeed(run.pk, token)
    assert settled() == [5]
    books.check()


def test_waiting_for_the_device_costs_nothing(member, clock):
    give(member, 100)
    run = queued(member)
    token = lifecycle.claim(run.pk)
    process = Heartbeat(run.pk, token, print, Meter(run))
    for phase, seconds in (("starting", 60), ("waiting", 3000), ("training", 360)):
        clock[0] += seconds
        process.tell(phase=phase)
        process._beat()
    lifecycle.succeed(run.pk, token)
    assert settled() == [1]


def test_killed_and_resumed_every_attempt_is_paid_once(member, clock):
    give(member, 100)
    run = queued(member)
    first = works(run, clock, 360)
    lifecycle.lost(run.pk, first, "exit code -9")  # kill -9: the run waits, its hold stays
    lifecycle.lost(run.pk, first, "exit code -9")
    assert settled() == [] and Hold.objects.get().closed_at is None
    late = run.heart
    second = works(run, clock, 360)
    clock[0] += 3600
    with pytest.raises(SystemExit):  # the first attempt was stopped, not dead: it counts nothing
        _beats_fenced_off(late)
    lifecycle.step_aside(run.pk, second)
    third = works(run, clock, 360)
    Run.objects.filter(pk=run.pk).update(attempt=3)
    lifecycle.lost(run.pk, third, "exit code -9")
    assert Run.objects.get(pk=run.pk).status == "failed"
    assert settled() == [3] and free(member) == 97
    # and goes on later: only what is new is paid then
    assert lifecycle.resume(run)
    assert Hold.objects.filter(closed_at=None).count() == 1
    lifecycle.succeed(run.pk, works(run, clock, 720))
    assert settled() == [3, 2] and free(member) == 95
    books.check()


def _beats_fenced_off(heart):
    from unittest import mock

    with mock.patch("portal.runs.heartbeat.os._exit", side_effect=SystemExit):
        heart._beat()


def test_a_beat_that_the_database_did_not_take_is_counted_with_the_next(member, clock):
    give(member, 100)
    run = queued(member)
    lifecycle.succeed(run.pk, works(run, clock, 180, 180, failing={0}))
    assert settled() == [1]


def test_a_clock_that_is_set_changes_no_bill(member, clock, monkeypatch):
    give(member, 100)
    run = queued(member)
    token = lifecycle.claim(run.pk)
    process = Heartbeat(run.pk, token, print, Meter(run))
    for days in (40, -300, 2):
        monkeypatch.setattr(
            timezone, "now", lambda real=timezone.now, days=days: real() + timedelta(days=days)
        )
        clock[0] += 120
        process.tell(phase="training")
        process._beat()
    lifecycle.succeed(run.pk, token)
    monkeypatch.undo()
    assert settled() == [1]
    books.check()


def test_what_belonged_to_a_deleted_run_or_user_is_settled_first(member, other_member, clock):
    give(member, 100), give(other_member, 100)
    run, theirs = queued(member), queued(other_member)
    works(run, clock, 360), works(theirs, clock, 360)
    run.delete()
    assert settled() == [1] and free(member) == 99
    other_member.delete()
    assert settled() == [1, 1]
    assert not Hold.objects.filter(closed_at=None).exists()
    assert books.total("used") == 2 * MICRO and books.total("balance") == 99 * MICRO
    books.check()


def test_a_left_over_hold_is_settled_by_the_reaper(member, clock):
    give(member, 100)
    run = queued(member)
    works(run, clock, 360)
    Run.objects.filter(pk=run.pk).update(status="failed")  # as no code of ours does
    lifecycle.Reaper().reap()
    assert settled() == [1]


# ------------------------------------------------------------------ the limit


def test_a_run_that_takes_longer_gets_more_until_there_is_nothing(
    member, clock, django_capture_on_commit_callbacks
):
    heard = []

    def hear(run, account, **signal):
        heard.append((run.pk, account.user))

    signals.limit_reached.connect(hear)
    measured(member, seconds=360)
    give(member, 3)
    run = queued(member)
    assert Hold.objects.get().amount == pytest.approx(MICRO, abs=MICRO / 1000)
    try:
        with django_capture_on_commit_callbacks(execute=True):
            token = works(run, clock, 361, 361, 361)
    finally:
        signals.limit_reached.disconnect(hear)
    assert heard == [(run.pk, member)] and free(member) == 0
    run.refresh_from_db()
    assert run.cancel_requested and run.paused
    assert run.heart.stop_requested is None
    run.heart._beat()
    assert run.heart.stop_requested == CANCEL  # as a pause: it saves its state and ends
    lifecycle.acknowledge_cancel(run.pk, token)
    run.refresh_from_db()
    assert (run.status, run.error["code"]) == ("cancelled", "budget_spent")
    entry = LogEntry.objects.get()
    assert entry.object_repr == str(run) and "used up" in entry.change_message
    # 1,083 s are 3.0083 units: what ran over is the pool's
    assert settled() == [pytest.approx(3.0083, abs=0.001)]
    assert books.total("used") > 3 * MICRO
    books.check()
    with pytest.raises(holds.OverBudget):
        lifecycle.resume(run)
    assert Run.objects.get(pk=run.pk).status == "cancelled"
    give(member, 3)
    assert lifecycle.resume(run) and Run.objects.get(pk=run.pk).error is None


def test_a_payer_who_goes_takes_the_runs_budget_along(member, clock):
    team = Team.objects.create(name="team")
    team.members.add(member)
    give(team, 100)
    run = queued(member)
    works(run, clock, 36)
    team.delete()
    assert settled() == [0.1]
    clock[0] += 1
    run.heart._beat()
    assert Run.objects.get(pk=run.pk).cancel_requested
    books.check()


def test_a_declared_device_says_which_rate_is_paid(settings):
    """Also where this process sees another one."""
    settings.DEVICE_RATES, settings.DEVICE = {"": 10 * MICRO, "cpu": MICRO}, ""
    settings.DEVICES = [Declared("cpu", 16 << 30)]
    assert pricing.device_rate() == MICRO
    settings.DEVICES = [Declared("cuda:0", 24 << 30)]
    assert pricing.device_rate() == 10 * MICRO
