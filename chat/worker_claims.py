"""What an inference worker claims of the machine's devices (portal/devices/arbiter.py), and the
thread that keeps its lease.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any

from django.conf import settings
from django.db import DatabaseError, close_old_connections

from portal.devices import arbiter, inventory
from portal.devices.models import Device
from portal.devices.placing import CHAT, Granted, Wish, torch_device

logger = logging.getLogger(__name__)


class WorkerClaims:
    """One claim for all that the worker has in memory. Where memory is not counted (no
    PORTAL_DEVICES, no PORTAL_BESIDE_CHAT) everything is granted, and is on the page all the same.
    A database that is away keeps no model from being served.
    """

    def __init__(self, address: str):
        self._holder = f"worker:{inventory.host()}:{address}"
        self._bytes: dict[tuple[Any, ...], int] = {}  # key of what is in memory -> bytes
        self._granted: tuple[str, ...] = ()  # devices
        self._lease: threading.Thread | None = None

    def reserve(
        self, key: tuple[Any, ...], label: str, needed: int | None, *, beside: bool = False
    ) -> bool:
        """beside: all that is in memory stays; else it may leave first. needed None: not known."""
        others = sum(count for each, count in self._bytes.items() if each != key)
        needed = needed or 0
        try:
            outcome = arbiter.ask(self._wish(others, needed, beside), label=label)
        except DatabaseError:
            logger.exception("what the worker takes of the devices cannot be written down")
            return True
        if not isinstance(outcome, Granted):
            if beside:  # it need not wait for that
                arbiter.leave_line(self._holder)
            return False
        self._granted = tuple(outcome.shares)
        self._bytes[key] = needed
        if self._lease is None or not self._lease.is_alive():
            self._lease = threading.Thread(target=self._renew, name="device lease", daemon=True)
            self._lease.start()
        return True

    def _wish(self, others: int, needed: int, beside: bool) -> Wish:
        names = tuple(device.name for device in inventory.register())
        if self._bytes and self._granted:  # what is in memory does not move
            names = self._granted
        elif not settings.DEVICES and ":" in settings.DEVICE:
            names = (settings.DEVICE,)
        together = len(names) > 1 and (not settings.DEVICES or bool(self._bytes))
        # what still runs has its memory until it has gone
        count = others + needed if beside else max(others, needed)
        return Wish(self._holder, CHAT, count, count, names, together)

    def took(self, key: tuple[Any, ...], count: int) -> None:
        """What it really takes, now that it is loaded."""
        self._bytes[key] = count
        self._settle()

    def keep(self, keys: list[tuple[Any, ...]]) -> None:
        """These are in memory, and nothing else is any more."""
        self._bytes = {key: count for key, count in self._bytes.items() if key in keys}
        self._settle()

    def _settle(self) -> None:
        with contextlib.suppress(DatabaseError):
            close_old_connections()
            arbiter.settle(self._holder, sum(self._bytes.values()))

    def must_leave(self) -> bool:
        return arbiter.asked_to_leave(self._holder) is not None

    def torch_device(self) -> str:
        """Where it was granted memory; "": as without a declaration."""
        return torch_device(self._granted) if settings.DEVICES and self._granted else ""

    def room_beside(self, key: tuple[Any, ...], taken: int) -> int:
        """Bytes of the granted devices that nobody claims, when `key` takes so many."""
        devices = Device.objects.filter(host=inventory.host(), name__in=self._granted)
        total = sum(devices.values_list("bytes", flat=True))
        claimed = arbiter.claims().filter(device__in=devices).values_list("bytes", flat=True)
        return max(0, total - sum(claimed) + self._bytes.get(key, 0) - taken)

    def _renew(self) -> None:
        pause = threading.Event()
        while not pause.wait(arbiter.BEAT):
            with contextlib.suppress(DatabaseError):
                close_old_connections()
                arbiter.renew(self._holder)
