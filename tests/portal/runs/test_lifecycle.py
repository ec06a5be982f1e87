"""The life of a Run: who may write, what survives, what ends it."""

import signal
import sys
import threading
from datetime import timedelta

import pytest
from django.db import OperationalError, connection
from django.utils import timezone
from django_q.models import OrmQ
from redis.exceptions import ConnectionError as RedisConnectionError

from portal.models import Run
from portal.runs import children, lifecycle

pytestmark = pytest.mark.django_db


@pytest.fixture
def run(member):
    return Run.objects.create(owner=member, kind=Run.Kind.TUNING, name="r", total=10)


def test_enqueue_rings_the_queue_of_the_run_only_after_commit(
    member, django_capture_on_commit_callbacks
):
    run = Run(owner=member, kind="tuning", name="r")
    with django_capture_on_commit_callbacks() as callbacks:
        lifecycle.enqueue(run)
        assert OrmQ.objects.count() == 0
    callbacks[0]()
    assert list(OrmQ.objects.values_list("key", flat=True)) == ["gpu"]


def test_a_broker_that_is_away_loses_no_run(run, monkeypatch):
    def away(*_arguments, **_options):
        raise RedisConnectionError("connection refused")

    with monkeypatch.context() as without_redis:
        without_redis.setattr(lifecycle, "async_task", away)
        without_redis.setattr(lifecycle, "get_broker", away)
        lifecycle.forget_deliveries(run.queue)
        lifecycle.ring(run.pk)
        assert lifecycle.Reaper().reap() == set()  # nor is its cluster taken for deaf
    assert lifecycle.Reaper().reap() == set() and OrmQ.objects.count() == 1


def test_only_one_claim_wins(run):
    token = lifecycle.claim(run.pk)
    assert token and lifecycle.claim(run.pk) is None
    run.refresh_from_db()
    assert (run.status, run.attempt, run.token) == ("running", 1, token)


@pytest.mark.django_db(transaction=True)
def test_only_one_of_many_simultaneous_claims_wins(run):
    tokens = []

    def answer_the_bell():
        tokens.append(lifecycle.claim(run.pk))
        connection.close()

    threads = [threading.Thread(target=answer_the_bell) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tokens) == 8 and len([token for token in tokens if token]) == 1


def test_heartbeat_renews_the_lease_and_carries_progress(run):
    token = lifecycle.claim(run.pk)
    Run.objects.filter(pk=run.pk).update(lease_expires_at=timezone.now() - timedelta(seconds=1))
    assert (
        lifecycle.heartbeat(run.pk, token, progress=4, phase="training")
        is lifecycle.Signal.CONTINUE
    )
    run.refresh_from_db()
    assert run.lease_expires_at > timezone.now() and run.percent == 40 and run.phase == "training"


def test_an_old_token_can_write_nothing(run):
    old = lifecycle.claim(run.pk)
    lifecycle.lost(run.pk, old, "killed")
    new = lifecycle.claim(run.pk)
    assert old != new
    for write in (
        lambda: lifecycle.heartbeat(run.pk, old, progress=9),
        lambda: lifecycle.succeed(run.pk, old),
        lambda: lifecycle.fail(run.pk, old, "x", "y"),
        lambda: lifecycle.acknowledge_cancel(run.pk, old),
        lambda: lifecycle.step_aside(run.pk, old),
    ):
        with pytest.raises(lifecycle.FencedOff):
            write()
    lifecycle.lost(run.pk, old, "again")
    run.refresh_from_db()
    assert (run.status, run.progress, run.token) == ("running", 0, new)


def test_a_finished_run_stays_finished(run):
    token = lifecycle.claim(run.pk)
    lifecycle.succeed(run.pk, token)
    with pytest.raises(lifecycle.FencedOff):
        lifecycle.fail(run.pk, token, "x", "y")
    lifecycle.cancel(run)
    lifecycle.lost(run.pk, token, "late")
    assert not lifecycle.resume(run)
    run.refresh_from_db()
    assert run.status == "succeeded" and run.finished_at


def test_cancel_ends_a_queued_run_and_tells_a_running_one(run):
    token = lifecycle.claim(run.pk)
    lifecycle.cancel(run)
    assert lifecycle.heartbeat(run.pk, token) is lifecycle.Signal.CANCEL
    lifecycle.acknowledge_cancel(run.pk, token)
    run.refresh_from_db()
    assert run.status == "cancelled"
    assert lifecycle.resume(run)
    lifecycle.cancel(run)
    run.refresh_from_db()
    assert run.status == "cancelled" and lifecycle.claim(run.pk) is None


def test_a_cancelled_run_whose_process_dies_is_cancelled_not_repeated(run):
    token = lifecycle.claim(run.pk)
    lifecycle.cancel(run)
    lifecycle.lost(run.pk, token, "exit code -9")
    run.refresh_from_db()
    assert run.status == "cancelled"


def test_a_lost_run_is_repeated_until_its_attempts_are_spent(run):
    for attempt in (1, 2):
        lifecycle.lost(run.pk, lifecycle.claim(run.pk), "exit code -9")
        run.refresh_from_db()
        assert (run.status, run.attempt) == ("queued", attempt)
    lifecycle.lost(run.pk, lifecycle.claim(run.pk), "exit code -9")
    run.refresh_from_db()
    assert (
        run.status == "failed"
        and run.error["code"] == "process_lost"
        and "-9" in run.error["message"]
    )


def test_stepping_aside_spends_no_attempt(run):
    for _ in range(5):
        lifecycle.step_aside(run.pk, lifecycle.claim(run.pk))
    run.refresh_from_db()
    assert (run.status, run.attempt) == ("queued", 0)


def test_the_reaper_requeues_expired_leases_and_rings_for_forgotten_runs(run, member):
    reaper = lifecycle.Reaper()
    lifecycle.claim(run.pk)
    assert reaper.reap() == set()
    Run.objects.filter(pk=run.pk).update(lease_expires_at=timezone.now() - timedelta(seconds=1))
    reaper.reap()
    run.refresh_from_db()
    assert run.status == "running"  # once more, should it live
    reaper.reap()
    run.refresh_from_db()
    assert run.status == "queued" and OrmQ.objects.count() == 1
    assert reaper.reap() == set() and OrmQ.objects.count() == 1  # rung a moment ago
    Run.objects.filter(pk=run.pk).update(rung_at=timezone.now() - lifecycle.RING_AGAIN)
    assert reaper.reap() == {"gpu"} and OrmQ.objects.count() == 2


def test_a_living_process_is_not_reaped_after_the_clock_or_the_database_was_away(run):
    reaper = lifecycle.Reaper()
    token = lifecycle.claim(run.pk)
    for _ in range(3):  # each time the lease is long over, and the process beats in between
        Run.objects.filter(pk=run.pk).update(lease_expires_at=timezone.now() - timedelta(hours=1))
        reaper.reap()
        lifecycle.heartbeat(run.pk, token)
    run.refresh_from_db()
    assert (run.status, run.token) == ("running", token)


def test_a_clock_set_back_keeps_no_dead_process_s_run(run, monkeypatch):
    monkeypatch.setattr(lifecycle, "LEASE", timedelta(seconds=-1))  # over as soon as it is cut
    reaper = lifecycle.Reaper()
    lifecycle.claim(run.pk)
    Run.objects.filter(pk=run.pk).update(lease_expires_at=timezone.now() + timedelta(hours=1))
    lifecycle.cancel(run)
    for _ in range(2):
        reaper.reap()
    run.refresh_from_db()
    assert run.status == "cancelled"


def test_a_run_that_waits_behind_another_is_not_rung_again(run, member):
    reaper = lifecycle.Reaper()
    first = Run.objects.create(owner=member, kind="tuning", name="first")
    lifecycle.claim(first.pk)
    Run.objects.filter(pk=run.pk).update(rung_at=timezone.now() - 2 * lifecycle.RING_AGAIN)
    assert reaper.reap() == set() and OrmQ.objects.count() == 0
    # Once it is free its cluster has the usual time to answer: a healthy one must not be taken for
    # deaf and restarted.
    lifecycle.succeed(first.pk, Run.objects.get(pk=first.pk).token)
    assert reaper.reap() == set() and OrmQ.objects.count() == 0


def test_queue_position_counts_what_goes_first(run, member):
    second = Run.objects.create(owner=member, kind="tuning", name="second")
    assert (run.queue_position(), second.queue_position()) == (0, 1)
    lifecycle.claim(run.pk)
    assert (Run.objects.get(pk=run.pk).queue_position(), second.queue_position()) == (None, 1)


# the watcher looks after its connection, which it may not inside a transaction
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("status", ["queued", "cancelled"])
def test_a_hung_process_does_not_hold_the_queue_once_its_run_was_given_to_others(
    run, monkeypatch, status
):
    monkeypatch.setattr(children, "LAST_WORDS", 0.2)
    token = lifecycle.claim(run.pk)
    child = children.spawn([sys.executable, "-c", "import time; time.sleep(60)"])
    child.send_signal(signal.SIGSTOP)
    # as the reaper and `cancel` leave it: the token stays
    Run.objects.filter(pk=run.pk).update(status=status)
    children._watch(child, run.pk, token)
    assert child.returncode == -signal.SIGKILL


@pytest.mark.django_db(transaction=True)
def test_a_database_that_does_not_answer_does_not_end_the_process(run, monkeypatch, tmp_path):
    token = lifecycle.claim(run.pk)
    faults = [OperationalError("server closed the connection")] * 2

    def answering():
        if faults:
            raise faults.pop()

    monkeypatch.setattr(children, "close_old_connections", answering)
    child = children.spawn(["sleep", "4"])
    children._watch(child, run.pk, token)
    assert child.returncode == 0 and not faults
