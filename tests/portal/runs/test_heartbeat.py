"""What the process of a run writes and hears, in this process; killed for real in
test_processes.py of the apps.
"""

import os
import signal

import pytest
from django.core.exceptions import ValidationError
from django.db import OperationalError

from portal.models import Run
from portal.runs import heartbeat, lifecycle
from portal.runs.heartbeat import RunFailed, StopRequested
from portal.runs.process import run_work
from portal.runs.work import RunWork

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def run(member):
    return Run.objects.create(owner=member, kind=Run.Kind.TUNING, name="r", total=10)


@pytest.fixture(autouse=True)
def slow_heartbeat(monkeypatch):
    """It beats only when it is told to, so that a test says when."""
    monkeypatch.setattr(heartbeat, "BEAT", 3600.0)


def ended(run, work) -> Run:
    class Work(RunWork):
        model = Run

        def work(self, heartbeat):
            work(heartbeat)

    status = run_work(Work(run.pk, print), lifecycle.claim(run.pk))
    run.refresh_from_db()
    assert run.status == status
    return run


def rename(run, name):
    return lambda: Run.objects.filter(pk=run.pk).update(name=name)


def test_what_the_work_tells_is_written_before_the_end(run):
    def work(heartbeat):
        heartbeat.tell(rename(run, "first"), progress=3, phase="training")
        heartbeat.tell(rename(run, "last"), progress=10)

    run = ended(run, work)
    assert (run.status, run.name, run.progress, run.phase) == ("succeeded", "last", 10, "")


def test_a_database_that_fails_once_loses_nothing(run, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.01)
    faults, wrote = [OperationalError("database is locked")], []

    def stubborn():
        if faults:
            raise faults.pop()
        rename(run, "written")()
        wrote.append(True)

    def work(heartbeat):
        heartbeat.tell(stubborn, progress=7)
        heartbeat.flush()
        # what flush promises; a read here could meet a beat, and an in-memory database has no wait
        assert faults == [] and wrote == [True]

    run = ended(run, work)
    assert (run.status, run.progress, run.name) == ("succeeded", 7, "written")


def test_who_was_fenced_off_writes_nothing_and_is_gone(run, monkeypatch):
    class Gone(BaseException):
        pass

    def leave(code):
        raise Gone(code)

    monkeypatch.setattr(heartbeat.os, "_exit", leave)

    def work(heartbeat):
        Run.objects.filter(pk=run.pk).update(token="another")
        heartbeat.tell(rename(run, "mine"), progress=9)
        heartbeat.flush()

    with pytest.raises(Gone) as gone:
        ended(run, work)
    run.refresh_from_db()
    assert gone.value.args == (heartbeat.EXIT_FENCED_OFF,)
    assert (run.status, run.name, run.progress, run.token) == ("running", "r", 0, "another")


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (RunFailed("checkpoint_changed", "other files"), "checkpoint_changed", "other files"),
        (ValidationError("the name is taken"), "invalid", "the name is taken"),
        (FileNotFoundError(2, "No such file", "/rows"), "file_missing", "/rows"),
        (ZeroDivisionError("by zero"), "unexpected", "by zero"),
    ],
)
def test_a_fault_is_named_in_the_row(run, fault, code, said):
    def work(heartbeat):
        raise fault

    run = ended(run, work)
    assert run.status == "failed" and run.error["code"] == code and said in run.error["message"]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, "queued"), (signal.SIGINT, "cancelled")]
)
@pytest.mark.parametrize("asks", [False, True])
def test_a_signal_stops_the_work_at_once_or_when_it_is_ready(run, number, status, asks):
    before = signal.getsignal(number)
    steps = []

    def work(heartbeat):
        heartbeat.work_asks = asks
        os.kill(os.getpid(), number)
        steps.append("saved")
        raise StopRequested(heartbeat.stop_requested)

    run = ended(run, work)
    assert run.status == status and steps == (["saved"] if asks else [])
    assert run.attempt == (0 if status == "queued" else 1)
    assert signal.getsignal(number) is before


def test_a_cancel_in_the_portal_is_heard_with_the_next_beat(run):
    def work(heartbeat):
        lifecycle.cancel(run)
        heartbeat.check()
        heartbeat.flush()
        heartbeat.check()

    assert ended(run, work).status == "cancelled"
