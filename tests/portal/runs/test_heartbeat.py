"""What a process that carries out a run writes and hears, in this process; killed for real in
test_processes.py of the apps.
"""

import os
import signal

import pytest
from django.core.exceptions import ValidationError
from django.db import OperationalError

from portal.models import Run
from portal.runs import heartbeat, lifecycle
from portal.runs.heartbeat import Asked, RunFailed, carry_out

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def run(member):
    return Run.objects.create(
        owner=member, kind=Run.Kind.TUNING, name="r", task="tuning.tasks.run", total=10
    )


@pytest.fixture(autouse=True)
def slow_heart(monkeypatch):
    """The heart beats only when it is told to, so that a test says when."""
    monkeypatch.setattr(heartbeat, "BEAT", 3600.0)


def ended(run, work) -> Run:
    status = carry_out(run.pk, lifecycle.claim(run.pk), work, print)
    run.refresh_from_db()
    assert run.status == status
    return run


def rename(run, name):
    return lambda: Run.objects.filter(pk=run.pk).update(name=name)


def test_what_the_work_tells_is_written_before_the_end(run):
    def work(heart):
        heart.tell(rename(run, "first"), progress=3, phase="training")
        heart.tell(rename(run, "last"), progress=10)

    run = ended(run, work)
    assert (run.status, run.name, run.progress, run.phase) == ("succeeded", "last", 10, "")


def test_a_database_that_fails_once_loses_nothing(run, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.01)
    faults = [OperationalError("database is locked")]

    def stubborn():
        if faults:
            raise faults.pop()
        rename(run, "written")()

    def work(heart):
        heart.tell(stubborn, progress=7)
        heart.flush()
        assert Run.objects.get(pk=run.pk).name == "written"

    run = ended(run, work)
    assert (run.status, run.progress, faults) == ("succeeded", 7, [])


def test_who_was_fenced_off_writes_nothing_and_is_gone(run, monkeypatch):
    class Gone(BaseException):
        pass

    def leave(code):
        raise Gone(code)

    monkeypatch.setattr(heartbeat.os, "_exit", leave)

    def work(heart):
        Run.objects.filter(pk=run.pk).update(token="another")
        heart.tell(rename(run, "mine"), progress=9)
        heart.flush()

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
    def work(heart):
        raise fault

    run = ended(run, work)
    assert run.status == "failed" and run.error["code"] == code and said in run.error["message"]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, "queued"), (signal.SIGINT, "cancelled")]
)
@pytest.mark.parametrize("patient", [False, True])
def test_a_signal_stops_the_work_at_once_or_when_it_is_ready(run, number, status, patient):
    before = signal.getsignal(number)
    steps = []

    def work(heart):
        heart.patient = patient
        os.kill(os.getpid(), number)
        steps.append("saved")
        raise Asked(heart.wish)

    run = ended(run, work)
    assert run.status == status and steps == (["saved"] if patient else [])
    assert run.attempt == (0 if status == "queued" else 1)
    assert signal.getsignal(number) is before


def test_a_cancel_in_the_portal_is_heard_with_the_next_beat(run):
    def work(heart):
        lifecycle.cancel(run)
        heart.check()
        heart.flush()
        heart.check()

    assert ended(run, work).status == "cancelled"
