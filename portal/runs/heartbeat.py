"""What the process of a run does beside its work: keeps the lease, hears requests to stop, carries
what the work tells to the database.

The work is on the main thread. A second thread writes about once a second: the lease, progress, and
what the work has told; the same write reads whether cancel was asked for. Whoever loses the fencing
token ends at once. SIGTERM puts the run back into the queue, SIGINT (Ctrl-C in the foreground)
cancels it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from django.db import DatabaseError, close_old_connections, connection, transaction

from portal.budget.meter import Meter
from portal.models import Run
from portal.runs import lifecycle

BEAT = 1.0  # seconds between two writes
PATIENCE = 900.0  # seconds without a database, in which the work goes on
STALL = 1800.0  # seconds in which the work tells nothing, after which the process counts as hung
EXIT_FENCED_OFF, EXIT_NO_DATABASE = 3, 4
CANCEL, STEP_ASIDE = "cancel", "step aside"

Log = Callable[[str], None]  # takes one line
Write = Callable[[], None]  # writes to the database


class StopRequested(Exception):
    """Somebody asked to stop; `reason` is CANCEL or STEP_ASIDE. What should be saved has been
    saved.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class ProcessLost(Exception):
    """A process that the work needs has died: the run goes on from what it has saved, as it does
    when its own process dies.
    """


class RunFailed(Exception):
    """The run cannot be carried out, and trying again would not help. Codes:
    portal/explanations.py.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Heartbeat(threading.Thread):
    """Keeps the run's lease and carries what the work tells to the database: a locked or absent
    database never stops the work.
    """

    def __init__(self, run_id: int, token: str, log: Log, meter: Meter | None = None):
        super().__init__(name="heartbeat", daemon=True)
        self._run_id, self._token, self._log = run_id, token, log
        self._meter, self._phase = meter, str(Run.Phase.STARTING)
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._writing = threading.Lock()  # one write at a time, the oldest words first
        self._progress: dict[str, Any] = {}
        self._writes: list[Write] = []
        self._alive = self._written = time.monotonic()
        self.stop_requested: str | None = None  # CANCEL or STEP_ASIDE
        # True: the work looks at `stop_requested` itself between two steps, signals do not
        # interrupt it
        self.work_asks = False

    # -- from the main thread

    def tell(self, *writes: Write, **progress) -> None:
        """A sign of life, with the row's new `phase`, `progress` or `total`. `writes` are called in
        the next beat's transaction, which the token guards, and again if that transaction fails.
        """
        with self._lock:
            self._writes += writes
            self._progress |= progress
            self._alive = time.monotonic()

    def check(self) -> None:
        """Raises StopRequested when somebody wants the run to stop."""
        if self.stop_requested:
            raise StopRequested(self.stop_requested)

    def waiting(self) -> None:
        """Called about twice a second while the work waits for a device."""
        self.tell(phase=Run.Phase.WAITING)
        self.check()

    def flush(self) -> None:
        """Returns when everything told has been written."""
        while not self._beat():
            time.sleep(BEAT)

    def close(self) -> None:
        """Stops beating; everything told has been written then. The main thread may write after
        it.
        """
        self._closed.set()
        self.join()
        self.flush()

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Turns signals into requests to stop. When the block has ended they are ignored: what is
        left takes no time, and must not be cut.
        """

        def request(reason: str) -> None:
            self.stop_requested = self.stop_requested or reason
            if not self.work_asks:
                raise StopRequested(self.stop_requested)

        reasons = {signal.SIGTERM: STEP_ASIDE, signal.SIGINT: CANCEL}
        for number, reason in reasons.items():
            signal.signal(number, lambda *_, reason=reason: request(reason))
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, reasons)  # what came before is heard here
            yield
        finally:
            for number in reasons:
                signal.signal(number, signal.SIG_IGN)

    # -- on its own thread

    def run(self) -> None:
        while not self._closed.wait(BEAT):
            self._beat()
        connection.close()

    def _beat(self) -> bool:
        """False when the database did not answer: what was told is kept for the next beat."""
        with self._writing:
            return self._write()

    def _write(self) -> bool:
        with self._lock:
            if time.monotonic() - self._alive > STALL:
                self._log(f"nothing has happened for {STALL:.0f} s: giving up the lease")
                os._exit(1)
            writes, self._writes = self._writes, []
            progress, self._progress = self._progress, {}
        phase = progress.get("phase", self._phase)
        try:
            close_old_connections()
            with transaction.atomic():
                signalled = lifecycle.heartbeat(self._run_id, self._token, **progress)
                if self._meter is not None:
                    self._meter.write(phase)
                for write in writes:
                    write()
        except lifecycle.FencedOff:
            self._log("another process holds this run now: stopping")
            # whatever the main thread is in the middle of, it must not write any more
            os._exit(EXIT_FENCED_OFF)
        except DatabaseError as error:
            self._log(f"the database does not answer ({error}); trying again")
            with self._lock:
                self._writes, self._progress = writes + self._writes, progress | self._progress
            # The lease may end meanwhile. Who takes the run over waits for the device, and the
            # token keeps this process from writing.
            if time.monotonic() - self._written > PATIENCE:
                os._exit(EXIT_NO_DATABASE)
            return False
        except Exception:
            try:
                self._log(traceback.format_exc().rstrip())
            finally:
                os._exit(1)  # without a heartbeat nobody would know that the work goes on
        self._written, self._phase = time.monotonic(), phase
        if self._meter is not None:
            self._meter.committed()
        if signalled is not lifecycle.Signal.CONTINUE:
            cancel = signalled is lifecycle.Signal.CANCEL
            self.stop_requested = self.stop_requested or (CANCEL if cancel else STEP_ASIDE)
        return True
