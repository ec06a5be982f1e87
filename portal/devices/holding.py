"""A run's side of the arbiter: waits for its devices, holds them while it computes, and steps aside
when one of them is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from django.conf import settings
from django.db import DatabaseError, close_old_connections

from portal.devices import arbiter, inventory, reasons
from portal.devices.models import DeviceClaim
from portal.devices.placing import Granted, Refused, Wish
from portal.models import QueueHold, Run
from portal.runs import device_lock
from portal.runs.heartbeat import STEP_ASIDE, Heartbeat, Log, RunFailed, StopRequested

POLL = 0.5  # seconds between two questions
WATCH = 5.0  # seconds between two looks whether the devices are still there


@contextlib.contextmanager
def hold(
    run: Run, wish: Wish, heartbeat: Heartbeat, log: Log, *, label: str = ""
) -> Iterator[Granted]:
    """Holds devices for the wish until the block ends.

    Raises RunFailed where no device could ever do, StopRequested when the run is to stop meanwhile,
    or when a device vanished: then what was saved goes on elsewhere, or waits.
    """
    inventory.register()
    token = Run.objects.values_list("token", flat=True).get(pk=run.pk)
    granted = _wait(run, token, wish, heartbeat, log, label)
    watch = _Watch(granted.shares)
    try:
        with contextlib.ExitStack() as locks:
            # Claims are a book; the lock ends with the process that really has the memory.
            for name in sorted(granted.shares):
                locks.enter_context(device_lock.hold(name, heartbeat.waiting))
            watch.start()
            try:
                yield granted
            except StopRequested:
                raise
            except Exception as fault:
                if watch.look():
                    raise
                log(f"a device of {', '.join(granted.shares)} is gone: {fault}")
                raise StopRequested(STEP_ASIDE) from fault
    finally:
        watch.end()
        with contextlib.suppress(DatabaseError):  # the run's end frees it as well
            arbiter.release(wish.holder, token)


def _wait(run: Run, token: str, wish: Wish, heartbeat: Heartbeat, log: Log, label: str) -> Granted:
    sweeper, told = arbiter.Sweeper(), ""
    try:
        while True:
            try:
                sweeper.sweep()
                outcome = arbiter.ask(wish, run=run, token=token, label=label)
                if isinstance(outcome, Granted):
                    return outcome
                told = _tell(outcome, wish, told, log)
                if QueueHold.objects.filter(queue=run.queue).exists():
                    raise StopRequested(STEP_ASIDE)
            except DatabaseError:
                close_old_connections()  # asked again over another one
            heartbeat.waiting()
            time.sleep(POLL)
    except BaseException:
        with contextlib.suppress(DatabaseError):
            arbiter.release(wish.holder, token)
        raise


def _tell(refused: Refused, wish: Wish, told: str, log: Log) -> str:
    """Into the log, once for each reason."""
    claim = DeviceClaim.objects.filter(holder=wish.holder, device=None).first()
    sentence = reasons.in_words(claim.reason) if claim is not None else ""
    if refused.code == "too_large" and settings.DEVICES:
        raise RunFailed("too_large_for_devices", sentence)
    if sentence and sentence != told:
        log(f"waits: {sentence}")
    return sentence


class _Watch(threading.Thread):
    """Looks whether the devices are there, and asks this process to save and step aside when not:
    as SIGTERM does, which is heard in whatever the work is doing.
    """

    def __init__(self, names) -> None:
        super().__init__(name="device watch", daemon=True)
        self._names, self._ended = list(names), threading.Event()

    def look(self) -> bool:
        """True: they are there, as far as anybody can tell."""
        try:
            inventory.register()
            return arbiter.usable(self._names)
        except DatabaseError:
            return True

    def run(self) -> None:
        while not self._ended.wait(WATCH):
            close_old_connections()
            if not self.look():
                os.kill(os.getpid(), signal.SIGTERM)
                break
        close_old_connections()

    def end(self) -> None:
        self._ended.set()
