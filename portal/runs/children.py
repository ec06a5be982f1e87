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
from datetime import datetime

import psutil
from django.conf import settings
from django.db import DatabaseError, close_old_connections

from portal.models import Run
from portal.runs import lifecycle

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
LAST_WORDS = 5.0  # seconds that a process has to exit once its run has ended
RUN_PROCESS = "portal.runs.process"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # heartbeat.py makes requests to stop of them
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


def spawn(
    argv: list[str], *, death_signal: int = signal.SIGKILL, blocked: tuple[int, ...] = (), **popen
) -> subprocess.Popen:
    """Starts `argv` (never a shell) in its own session. It gets `death_signal` when this process
    dies, however it dies. The `blocked` signals wait until it lets them in.
    """
    parent = os.getpid()

    def in_the_child():
        if blocked:
            signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        end_with_parent(death_signal)
        if os.getppid() != parent:  # it died before the kernel was told
            os.kill(os.getpid(), death_signal)

    return subprocess.Popen(argv, start_new_session=True, preexec_fn=in_the_child, **popen)


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


def answer_bell(queue: str) -> str:
    """What django-q2 calls: claims the next run of the queue, of whichever kind, starts its process
    and watches it until it ends.

    Does nothing when none waits. The child writes its own progress and end; what is left
    here is the end that it cannot write itself: killed, crashed, or hung beyond its lease. Returns
    a word for the queue's own record.
    """
    claimed = lifecycle.claim_next(queue)
    if claimed is None:
        return "nothing waits"
    run_id, token = claimed
    run = Run.objects.get(pk=run_id)
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.log_path, "ab") as log:
        child = spawn(
            [*settings.LAUNCHER, sys.executable, "-m", RUN_PROCESS, str(run_id), token],
            death_signal=signal.SIGTERM,  # it saves what it has and steps aside
            # until it can do that; a launcher must hear them at once
            blocked=() if settings.LAUNCHER else STOP_SIGNALS,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=settings.BASE_DIR,
            env={**os.environ, "PORTAL_DATA_DIR": str(settings.DATA_DIR)},
        )
        try:
            _watch(child, run_id, token)
        finally:
            if child.poll() is None:
                stop(child)
    run.refresh_from_db()
    if run.token == token and run.status == Run.Status.RUNNING:
        lifecycle.lost(run_id, token, f"exit code {child.returncode}")
    return f"run {run_id}: exit code {child.returncode}"


def stray_run_processes() -> list[psutil.Process]:
    """Processes of runs on this data folder that no queue worker watches: what a supervisor that
    was killed has left behind.
    """
    found, mark = [], str(settings.DATA_DIR)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                RUN_PROCESS in process.cmdline()
                and process.environ().get("PORTAL_DATA_DIR") == mark
                and "qcluster" not in " ".join(process.parent().cmdline())
            ):
                found.append(process)
    return found


def _watch(child: subprocess.Popen, run_id: int, token: str) -> None:
    """Returns when the child has ended; ends it when the run is no longer this child's, or its
    lease is over. While the database does not answer, the child decides for itself
    (heartbeat.py).

    A launcher may wait for a machine as long as it likes. The lease is kept here until the run's
    process, wherever it is, has begun to keep it itself.
    """
    # Times of this process alone: the clock may be set while it watches.
    heartbeat_at, seen = None, time.monotonic()
    launching = bool(settings.LAUNCHER)
    kept = Run.objects.values_list("heartbeat_at", flat=True).get(pk=run_id)
    while child.poll() is None:
        time.sleep(1.0)
        try:
            close_old_connections()
            run = Run.objects.filter(pk=run_id).only("token", "status", "heartbeat_at").first()
        except DatabaseError as error:
            logger.warning("run %s: the database does not answer (%s)", run_id, error)
            seen = time.monotonic()
            continue
        if run is not None and run.heartbeat_at != heartbeat_at:
            heartbeat_at, seen = run.heartbeat_at, time.monotonic()
        launching = launching and run is not None and run.heartbeat_at == kept
        if launching and run.token == token and run.status == Run.Status.RUNNING:
            kept = _keep_lease(child, run_id, token) or kept
        elif run is None or run.token != token:
            logger.warning("run %s: fenced off, stopping its process", run_id)
            stop(child, grace=2.0)
        elif run.status != Run.Status.RUNNING:
            # Ended, or the reaper was first and has queued it again: a process that hangs must not
            # hold the queue.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(LAST_WORDS)
            stop(child, grace=2.0)
        elif time.monotonic() - seen > lifecycle.LEASE.total_seconds():
            logger.warning("run %s: no heartbeat, killing its process", run_id)
            kill_group(child)
            child.wait()


def _keep_lease(launcher: subprocess.Popen, run_id: int, token: str) -> datetime | None:
    """In place of the run's process, which waits to be started. Returns what was written, or None
    when nothing could be.
    """
    with contextlib.suppress(lifecycle.FencedOff, DatabaseError):
        wish = lifecycle.heartbeat(run_id, token, phase=Run.Phase.WAITING)
        if wish == lifecycle.Signal.CANCEL:
            stop(launcher)
            lifecycle.acknowledge_cancel(run_id, token)
        return Run.objects.values_list("heartbeat_at", flat=True).get(pk=run_id)
    return None
