"""Child processes that end with their parent: those of the supervisor (`up`), and the process of a
run.
"""

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time

from django.conf import settings
from django.db import close_old_connections

from portal.models import Run
from portal.runs import lifecycle

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
LAST_WORDS = 5.0  # seconds that a process has to exit once its run has ended
GRACE = 20.0  # seconds between SIGTERM (save what is needed to go on) and SIGKILL


def end_with_parent(number: int) -> None:
    """Called in a child: the kernel sends it signal `number` when its parent dies. Linux only;
    elsewhere nothing happens.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Called in the supervisor: grandchildren whose parent dies become its children, so that it can
    see them end. Linux only.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def spawn(argv: list[str], **popen) -> subprocess.Popen:
    """Starts `argv` (never a shell) in its own session; it gets SIGTERM when this process dies,
    however it dies.
    """
    return subprocess.Popen(
        argv, start_new_session=True, preexec_fn=lambda: end_with_parent(signal.SIGTERM), **popen
    )


def kill_group(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def stop(process: subprocess.Popen, grace: float = GRACE) -> None:
    """SIGTERM to the whole group, SIGKILL after `grace` seconds."""
    kill_group(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    kill_group(process)
    process.wait()


def answer_bell(run_id: int) -> str:
    """What django-q2 calls, for runs of every kind: claims the run, starts its process and watches
    it until it ends.

    Does nothing when the claim is lost. The child writes its own progress and end; what is left
    here is the end that it cannot write itself: killed, crashed, or hung beyond its lease. Returns
    a word for the queue's own record.
    """
    token = lifecycle.claim(run_id)
    if token is None:
        return "not claimed"
    run = Run.objects.get(pk=run_id)
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.log_path, "ab") as log:
        child = spawn(
            [sys.executable, "-m", "portal.runs.process", str(run_id), token],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=settings.BASE_DIR,
        )
        try:
            _watch(child, run_id, token)
        finally:
            if child.poll() is None:
                stop(child)
    run.refresh_from_db()
    if run.token == token and run.status == Run.Status.RUNNING:
        lifecycle.lost(run_id, token, f"exit code {child.returncode}")
    return f"exit code {child.returncode}"


def _watch(child: subprocess.Popen, run_id: int, token: str) -> None:
    """Returns when the child has ended; ends it when the run is no longer this child's, or its
    lease is over.
    """
    while child.poll() is None:
        time.sleep(1.0)
        close_old_connections()
        run = Run.objects.filter(pk=run_id).only("token", "status", "heartbeat_at").first()
        if run is None or run.token != token:
            logger.warning("run %s: fenced off, stopping its process", run_id)
            stop(child, grace=2.0)
        elif run.status != Run.Status.RUNNING:
            # Ended, or the reaper was first and has queued it again: a process that hangs must not
            # hold the queue.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(LAST_WORDS)
            stop(child, grace=2.0)
        elif time.time() - run.heartbeat_at.timestamp() > lifecycle.LEASE.total_seconds():
            logger.warning("run %s: no heartbeat, killing its process", run_id)
            kill_group(child)
            child.wait()
