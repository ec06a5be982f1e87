"""`python -m portal.runs.process RUN TOKEN`: the process that carries out one claimed run, of
whichever kind. Its output is the run's log.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator

import django

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")
    django.setup()

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import close_old_connections
from django.utils import timezone

from portal.budget.meter import Meter
from portal.models import Run
from portal.outages import outage_of
from portal.runs import lifecycle
from portal.runs.heartbeat import (
    CANCEL,
    STEP_ASIDE,
    Heartbeat,
    Log,
    ProcessLost,
    StopRequested,
)
from portal.runs.work import RunWork, work_of


def carry_out(run_id: int, token: str, log: Log) -> str:
    """Does a claimed run's work and returns the status it ended in; the run's row says the rest.

    Raises FencedOff when another process took the run over at its very end.
    """
    kind = Run.objects.only("kind").get(pk=run_id).kind
    work = work_of(kind)(run_id, log)
    status = run_work(work, token)
    if status == Run.Status.SUCCEEDED:
        work.after_success()
        _send_figures(work)
    return status


def _send_figures(work: RunWork) -> None:
    """To the MLflow server of the settings, if there is one; the row says what became of it."""
    if not settings.MLFLOW_URL:
        return
    from portal.runs import mlflow  # and with it an HTTP client

    run = work.load(work.run.pk)
    if figures := work.figures():
        told = mlflow.send(run, figures)
        Run.objects.filter(pk=run.pk).update(tracking=told)
        work.log(f"MLflow: {told.get('url') or told['error']}")


def run_work(work: RunWork, token: str) -> str:
    """`work.work` with a heartbeat beside it; writes how it ended (a fault with a `code` is told by
    it) and returns the run's status.
    """
    run_id, log = work.run.pk, work.log
    heartbeat = Heartbeat(run_id, token, log, Meter(work.run))
    error: tuple[str, str] | None = None
    stopped = lost = None

    with _handlers_restored():
        heartbeat.start()
        try:
            with heartbeat.handling_signals():
                work.work(heartbeat)
        except StopRequested as request:
            stopped = request.reason
        except ProcessLost as loss:
            lost = str(loss)
            log(lost)
        except Exception as fault:
            error = _code_and_message(fault)
            unexpected = error[0] == "unexpected"
            log(traceback.format_exc().rstrip() if unexpected else f"failed: {error[1]}")
        heartbeat.close()

        close_old_connections()
        if lost is not None:
            lifecycle.lost(run_id, token, lost)
        elif error is not None:
            lifecycle.fail(run_id, token, *error)
        elif stopped == CANCEL:
            lifecycle.acknowledge_cancel(run_id, token)
        elif stopped == STEP_ASIDE:
            lifecycle.step_aside(run_id, token)
        else:
            lifecycle.succeed(run_id, token)

    status = Run.objects.only("status").get(pk=run_id).status
    log(
        {Run.Status.QUEUED: "stepped aside: the run goes on later from where it is"}.get(
            status, status
        )
    )
    return status


@contextlib.contextmanager
def _handlers_restored() -> Iterator[None]:
    """Signals are heard as before when the block ends, however it ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _code_and_message(fault: Exception) -> tuple[str, str]:
    """(code, message) for the run's row."""
    if isinstance(fault, ValidationError):
        return "invalid", "; ".join(fault.messages)
    if isinstance(fault, FileNotFoundError):
        return "file_missing", f"{fault.strerror}: {fault.filename}"
    outage = outage_of(fault)
    if outage is not None and outage.code == "disk_full":
        return outage.code, str(fault)
    if type(fault).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return "out_of_memory", str(fault)
    code = getattr(fault, "code", None)
    if isinstance(code, str):
        return code, str(fault)
    return "unexpected", f"{type(fault).__name__}: {fault}"


def stamped(line: str) -> str:
    return f"{timezone.localtime():%Y-%m-%d %H:%M:%S}  {line}"


def print_line(line: str, file=None) -> None:
    """A line of the log. A full disk, or a terminal that is gone, is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):
        print(stamped(line), file=file, flush=True)


if __name__ == "__main__":
    carry_out(int(sys.argv[1]), sys.argv[2], print_line)
