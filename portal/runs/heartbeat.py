"""What every process that carries out a run does beside its work: keeps the lease, hears wishes to
stop, writes how it ended.

`carry_out` runs the work on the main thread. A second thread, the heart, writes about once a
second: the lease, progress, and what the work has told; the same write reads the wish to cancel.
Whoever loses the fencing token ends at once. SIGTERM puts the run back into the queue, SIGINT
(Ctrl-C in the foreground) cancels it.
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

from django.core.exceptions import ValidationError
from django.db import DatabaseError, close_old_connections, connection, transaction
from django.utils import timezone

from portal.models import Run
from portal.runs import lifecycle

BEAT = 1.0  # seconds between two writes
STALL = 1800.0  # seconds in which the work tells nothing, after which the process counts as hung
EXIT_FENCED_OFF, EXIT_NO_DATABASE = 3, 4
CANCEL, STEP_ASIDE = "cancel", "step aside"

Say = Callable[[str], None]  # one line for the run's log
Write = Callable[[], None]  # writes to the database


class Asked(Exception):
    """Somebody asked to stop; `wish` is CANCEL or STEP_ASIDE. What should be saved has been
    saved.
    """

    def __init__(self, wish: str):
        super().__init__(wish)
        self.wish = wish


class RunFailed(Exception):
    """The run cannot be carried out, and trying again would not help. Codes:
    portal/explanations.py.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Heart(threading.Thread):
    """Keeps the run's lease and carries what the work tells to the database: a locked or absent
    database never stops the work.
    """

    def __init__(self, run_id: int, token: str, say: Say):
        super().__init__(name="heart", daemon=True)
        self._run_id, self._token, self._say = run_id, token, say
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._writing = threading.Lock()  # one write at a time, the oldest words first
        self._progress: dict[str, Any] = {}
        self._writes: list[Write] = []
        self._alive = self._written = time.monotonic()
        self.wish: str | None = None
        # True: the work looks at `wish` itself between two steps, signals do not interrupt it
        self.patient = False

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
        """Raises Asked when somebody wants the run to stop."""
        if self.wish:
            raise Asked(self.wish)

    def wait(self) -> None:
        """Called about twice a second while the work waits for a device."""
        self.tell(phase="waiting")
        self.check()

    def flush(self) -> None:
        """Returns when everything told has been written."""
        while not self._beat():
            time.sleep(BEAT)

    def end(self) -> None:
        """Stops beating; everything told has been written then. The main thread may write after
        it.
        """
        self._ended.set()
        self.join()
        self.flush()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Turns signals into wishes. When the block has ended they are ignored: what is left takes
        no time, and must not be cut.
        """

        def hear(wish: str) -> None:
            self.wish = self.wish or wish
            if not self.patient:
                raise Asked(self.wish)

        wishes = {signal.SIGTERM: STEP_ASIDE, signal.SIGINT: CANCEL}
        for number, wish in wishes.items():
            signal.signal(number, lambda *_, wish=wish: hear(wish))
        try:
            yield
        finally:
            for number in wishes:
                signal.signal(number, signal.SIG_IGN)

    # -- on its own thread

    def run(self) -> None:
        while not self._ended.wait(BEAT):
            self._beat()
        connection.close()

    def _beat(self) -> bool:
        """False when the database did not answer: what was told is kept for the next beat."""
        with self._writing:
            return self._write()

    def _write(self) -> bool:
        with self._lock:
            if time.monotonic() - self._alive > STALL:
                self._say(f"nothing has happened for {STALL:.0f} s: giving up the lease")
                os._exit(1)
            writes, self._writes = self._writes, []
            progress, self._progress = self._progress, {}
        try:
            close_old_connections()
            with transaction.atomic():
                signalled = lifecycle.heartbeat(self._run_id, self._token, **progress)
                for write in writes:
                    write()
        except lifecycle.FencedOff:
            self._say("another process holds this run now: stopping")
            # whatever the main thread is in the middle of, it must not write any more
            os._exit(EXIT_FENCED_OFF)
        except DatabaseError as error:
            self._say(f"the database does not answer ({error}); trying again")
            with self._lock:
                self._writes, self._progress = writes + self._writes, progress | self._progress
            if time.monotonic() - self._written > lifecycle.LEASE.total_seconds():
                os._exit(EXIT_NO_DATABASE)
            return False
        except Exception:
            self._say(traceback.format_exc().rstrip())
            os._exit(1)  # without a heart nobody would know that the work goes on
        self._written = time.monotonic()
        if signalled is lifecycle.Signal.CANCEL:
            self.wish = self.wish or CANCEL
        return True


def carry_out(run_id: int, token: str, work: Callable[[Heart], None], say: Say) -> str:
    """Does `work(heart)` for a claimed run and returns the status it ended in; the run's row says
    the rest.

    The work returns when all is done, raises Asked when it stopped on the way, anything else when
    it failed (a fault with a `code` is told by it). Raises FencedOff when another process took the
    run over at its very end.
    """
    heart = Heart(run_id, token, say)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    error: tuple[str, str] | None = None
    wish = None
    heart.start()
    try:
        with heart.listening():
            work(heart)
    except Asked as asked:
        wish = asked.wish
    except Exception as fault:
        error = _named(fault)
        say(f"failed: {error[1]}" if error[0] != "unexpected" else traceback.format_exc().rstrip())
    heart.end()
    close_old_connections()
    try:
        if error is not None:
            lifecycle.fail(run_id, token, *error)
        elif wish == CANCEL:
            lifecycle.acknowledge_cancel(run_id, token)
        elif wish == STEP_ASIDE:
            lifecycle.step_aside(run_id, token)
        else:
            lifecycle.succeed(run_id, token)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status = Run.objects.only("status").get(pk=run_id).status
    say(
        {Run.Status.QUEUED: "stepped aside: the run goes on later from where it is"}.get(
            status, status
        )
    )
    return status


def _named(fault: Exception) -> tuple[str, str]:
    """(code, message) for the run's row."""
    if isinstance(fault, ValidationError):
        return "invalid", "; ".join(fault.messages)
    if isinstance(fault, FileNotFoundError):
        return "file_missing", f"{fault.strerror}: {fault.filename}"
    if type(fault).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return "out_of_memory", str(fault)
    code = getattr(fault, "code", None)
    if isinstance(code, str):
        return code, str(fault)
    return "unexpected", f"{type(fault).__name__}: {fault}"


def stamped(line: str) -> str:
    return f"{timezone.localtime():%Y-%m-%d %H:%M:%S}  {line}"


def log_line(line: str) -> None:
    """`say` of a process whose output is the run's log."""
    print(stamped(line), flush=True)
