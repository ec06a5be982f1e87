"""Keeps the portal's processes running: web, inference worker and the two queue clusters."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import psutil
from django.conf import settings
from django.db import DatabaseError, close_old_connections

from portal.runs import children, lifecycle

logger = logging.getLogger(__name__)

REAP_EVERY = 5.0  # seconds
LONGEST_PAUSE = 30.0  # between two starts of a child that keeps dying
STOP_GRACE = 15.0  # a trainer saves its state in this time


@dataclass
class Child:
    """One supervised process. `queue` is set for queue clusters."""

    name: str
    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    queue: str | None = None
    process: subprocess.Popen | None = None
    started: float = 0.0
    pause: float = 0.5
    start_at: float = 0.0

    def start(self) -> None:
        if self.queue:
            lifecycle.forget_deliveries(self.queue)
        self.process = children.spawn(
            self.argv, env={**os.environ, **self.environment}, cwd=settings.BASE_DIR
        )
        self.started = time.monotonic()

    def died(self) -> bool:
        """True once per death; then what is left of its group is killed and the next start is
        planned.
        """
        if self.process is None or self.process.poll() is None:
            return False
        children.kill_group(self.process)
        lived = time.monotonic() - self.started
        self.pause = 0.5 if lived > 20 else min(self.pause * 2, LONGEST_PAUSE)
        self.start_at = time.monotonic() + self.pause
        # No exit code is a good one here: a queue cluster that lost its sentinel exits with 0.
        logger.warning(
            "%s ended with code %s; starting again in %.1f s",
            self.name,
            self.process.returncode,
            self.pause,
        )
        self.process = None
        return True


def child_processes(host: str, port: int, worker: bool) -> list[Child]:
    manage = [sys.executable, str(settings.BASE_DIR / "manage.py")]
    web = [sys.executable, "-m", "portal.web_server", "--host", host, "--port", str(port)]
    found = [Child("web", web)]
    if worker:
        found.append(Child("worker", [*manage, "inference_worker"]))
    for queue in ("default", "gpu"):
        found.append(
            Child(f"queue {queue}", [*manage, "qcluster"], {"Q_CLUSTER_NAME": queue}, queue)
        )
    return found


class Supervisor:
    """Runs until SIGINT or SIGTERM; then nothing of it is left."""

    def __init__(self, children: list[Child]):
        self.children = children
        self.stopping = False

    def run(self, announce) -> None:
        """`announce()` is called after each round until it returns True."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        children.adopt_orphans()
        announced, reaped = False, time.monotonic()
        try:
            for child in self.children:
                child.start()
            while not self.stopping:
                for child in self.children:
                    child.died()
                    if child.process is None and time.monotonic() >= child.start_at:
                        child.start()
                if time.monotonic() - reaped > REAP_EVERY:
                    reaped = time.monotonic()
                    self._reap()
                announced = announced or announce()
                time.sleep(0.3)
        finally:
            self._end()

    def _stop(self, *_signal) -> None:
        self.stopping = True

    def _reap(self) -> None:
        self._collect_exit_codes()
        close_old_connections()
        try:
            deaf = lifecycle.reap()
        except DatabaseError:
            logger.exception("the reaper could not reach the database")
            return
        for child in self.children:
            # A cluster whose idle worker was killed hangs for ever on a lock that the dead process
            # holds (django-q2 #23).
            if (
                child.queue in deaf
                and child.process is not None
                and time.monotonic() - child.started > 30
            ):
                logger.warning("%s does not answer: restarting it", child.name)
                children.kill_group(child.process)

    def _collect_exit_codes(self) -> None:
        """Collects the exit codes of adopted orphans, which would stay as zombies otherwise."""
        own = {child.process.pid for child in self.children if child.process is not None}
        for process in psutil.Process().children():
            if process.pid not in own and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)

    def _end(self) -> None:
        for child in self.children:
            if child.process is not None:
                # A cluster told to end politely waits for its task, or hangs; killed, it loses
                # nothing: the rows are the truth, and a trainer gets SIGTERM when its queue worker
                # dies, saves its state and steps aside.
                children.kill_group(
                    child.process, signal.SIGKILL if child.queue else signal.SIGTERM
                )
        _gone, alive = psutil.wait_procs(
            psutil.Process().children(recursive=True), timeout=STOP_GRACE
        )
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
