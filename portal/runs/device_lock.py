"""One training or evaluation per device: a file lock that ends with its process, however that
ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from django.conf import settings

POLL = 0.5  # seconds


def lock_path(device: str) -> Path:
    """The lock of a device of this machine. CUDA devices are told apart as CUDA_VISIBLE_DEVICES
    names them.
    """
    kind, _, index = device.partition(":")
    if kind == "cuda":
        visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
        number = int(index or 0)
        kind = f"cuda-{visible[number] if number < len(visible) else number}"
    folder = settings.DATA_DIR / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / re.sub(r"[^\w.-]", "_", f"{platform.node()}-{kind}.lock")


@contextlib.contextmanager
def hold(device: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the device's lock; calls `waiting` about twice a second until it is free."""
    with open(lock_path(device), "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(POLL)
        yield
