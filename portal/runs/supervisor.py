"""Keeps the portal's processes running: web, inference worker and the queue clusters.

One supervisor for a data folder (`only_one`). Whatever it starts ends with it: the kernel kills its
children when it dies, and a run's process, which is told to save and stop, is killed after a grace.
"""

import contextlib
import fcntl
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from django.conf import settings
from django.db import DatabaseError, close_old_connections
from django.utils.module_loading import import_string

from portal.devices import arbiter, inventory
from portal.notices import delivery
from portal.runs import children, lifecycle

logger = logging.getLogger(__name__)

REAP_EVERY = 5.0  # seconds
LOOK_AT_DEVICES = 30.0  # seconds
PROBE_EVERY, PROBE_TIMEOUT = 3.0, 5.0  # seconds
MOST_MISSES = 5  # probes in a row, after which a process counts as hung
LONGEST_START = 300.0  # seconds until the first answer
LONGEST_PAUSE = 30.0  # between two starts of a child that keeps dying
STOP_GRACE = 15.0  # a trainer saves its state in this time


class AlreadySupervised(Exception):
    """Another supervisor holds the data folder; the message says which."""


@contextlib.contextmanager
def only_one(data_dir: Path, place: str) -> Iterator[None]:
    """Holds the data folder for one supervisor, until the block or the process ends. `place`: where
    this one listens, for the message of the next.
    """
    with open(os.open(data_dir / "supervisor.lock", os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadySupervised(file.read().strip()) from None
        file.truncate()
        file.write(f"{place}, process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


@dataclass
class Probe:
    """Asks the process that `connect(timeout)` reaches for `path`, every few seconds on a thread.
    Any answer is one: whether all is well is not the question.
    """

    connect: Callable[[float], socket.socket]
    path: str
    misses: int | None = None  # in a row; None before the first answer

    def begin(self) -> None:
        threading.Thread(target=self._ask_regularly, name="probe", daemon=True).start()

    def _ask_regularly(self) -> None:
        while True:
            time.sleep(PROBE_EVERY)
            if self._answers():
                self.misses = 0
            elif self.misses is not None:
                self.misses += 1

    def _answers(self) -> bool:
        try:
            with self.connect(PROBE_TIMEOUT) as connection:
                connection.sendall(f"HEAD {self.path} HTTP/1.0\r\n\r\n".encode())
                return bool(connection.recv(1))
        except OSError:
            return False


@dataclass
class Child:
    """One supervised process. `queue` is set for queue clusters."""

    name: str
    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    queue: str | None = None
    probe: Probe | None = None
    process: subprocess.Popen | None = None
    started: float = 0.0
    pause: float = 0.5
    start_at: float = 0.0

    def start(self) -> None:
        if self.queue:
            lifecycle.forget_deliveries(self.queue)
        shared = {"PORTAL_WORKER_TOKEN": settings.WORKER_TOKEN}  # a file may be lost meanwhile
        self.process = children.spawn(
            self.argv, env={**os.environ, **shared, **self.environment}, cwd=settings.BASE_DIR
        )
        self.started = time.monotonic()
        if self.probe is not None:
            self.probe.misses = None

    def kill_if_hung(self) -> None:
        if self.process is not None and self.probe is not None:
            misses = self.probe.misses
            if misses is None and time.monotonic() - self.started > LONGEST_START:
                logger.warning("%s has not answered since its start: killing it", self.name)
            elif misses is not None and misses >= MOST_MISSES:
                logger.warning("%s does not answer: killing it", self.name)
            else:
                return
            self.probe.misses = None
            children.kill_group(self.process)

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
    # a file, which needs neither database nor worker
    probe = Probe(
        lambda timeout: socket.create_connection((reached(host), port), timeout),
        f"{settings.STATIC_URL}portal/portal.css",
    )
    found = [Child("web", web, probe=probe)]
    if worker:
        probe = Probe(import_string(settings.WORKER_CONNECT), "/status")
        found.append(Child("worker", [*manage, "inference_worker"], probe=probe))
    for queue in ("default", "gpu", "batch"):
        found.append(
            Child(f"queue {queue}", [*manage, "qcluster"], {"Q_CLUSTER_NAME": queue}, queue)
        )
    return found


def reached(host: str) -> str:
    """Where a server that listens on `host` is reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


class Supervisor:
    """Runs until it is told to stop (Ctrl-C, SIGTERM, a closed terminal); then nothing of it is
    left.
    """

    def __init__(self, children: list[Child]):
        self.children = children
        self.stopping = False
        self._reaper, self._sweeper = lifecycle.Reaper(), arbiter.Sweeper()
        self._looked = -LOOK_AT_DEVICES  # when the devices were last looked at
        self._adopted: dict[psutil.Process, float] = {}  # run processes without a queue worker

    def run(self, announce) -> None:
        """`announce()` is called after each round until it returns True."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, self._stop)  # also where a shell's `&` has had it ignored
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, self._stop)
        children.adopt_orphans()
        announced, reaped = False, time.monotonic()
        try:
            for child in self.children:
                child.start()
                if child.probe is not None:
                    child.probe.begin()
            while not self.stopping:
                for child in self.children:
                    child.kill_if_hung()
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

    def _stop(self, number, _frame) -> None:
        logger.info("stopping: %s", signal.Signals(number).name)
        self.stopping = True

    def _reap(self) -> None:
        self._collect_exit_codes()
        self._end_strays()
        close_old_connections()
        try:
            deaf = self._reaper.reap()
            self._sweeper.sweep()
            delivery.ring_due()
            if time.monotonic() - self._looked > LOOK_AT_DEVICES:
                self._looked = time.monotonic()
                inventory.register()
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

    def _end_strays(self) -> None:
        """A run's process whose queue worker has died was told to stop by the kernel. One that
        cannot (stopped, hung) would keep its device from the next for ever.
        """
        now = time.monotonic()
        strays = children.stray_run_processes()
        self._adopted = {process: self._adopted.get(process, now) for process in strays}
        for process, since in self._adopted.items():
            if now - since > children.GRACE:
                logger.warning("process %s of a run has not stopped: killing it", process.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

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
