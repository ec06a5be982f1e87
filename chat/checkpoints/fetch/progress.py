"""How far a fetch is: bytes per file and in all, speed and time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

WINDOW = 10.0  # seconds that the speed is averaged over


@dataclass
class FileProgress:
    name: str
    size: int  # bytes
    done: int = 0


class Watch:
    """What the transfers tell, and what they ask: `check` raises when somebody wants the fetch to
    stop.

    `tell(snapshot)` is called after each piece of news; whoever writes it somewhere decides how
    often.
    """

    def __init__(
        self,
        tell: Callable[[dict[str, Any]], None] = lambda snapshot: None,
        check: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._tell, self._check, self._clock = tell, check, clock
        self._phase = ""
        self._files: dict[str, FileProgress] = {}
        self._samples: deque[tuple[float, int]] = deque()
        self._received = (
            0  # bytes that came in this attempt; what an earlier one kept makes no speed
        )

    def plan(self, files: Iterable[tuple[str, int]]) -> None:
        """All files that are to come, with their sizes."""
        self._files = {name: FileProgress(name, size) for name, size in files}
        self._news()

    def phase(self, name: str) -> None:
        """listing | downloading | checking | unpacking | converting | registering"""
        self._phase = name
        self._samples.clear()
        self._news()

    def at(self, name: str, done: int, received: int = 0) -> None:
        """File `name` has `done` bytes now, `received` of which came since the last word."""
        if name in self._files:
            self._files[name].done = done
        self._received += received
        now = self._clock()
        self._samples.append((now, self._received))
        while now - self._samples[0][0] > WINDOW:
            self._samples.popleft()
        self._news()
        self._check()

    def check(self) -> None:
        self._check()

    def snapshot(self) -> dict[str, Any]:
        """{"phase", "files": [{"name", "size", "done"}], "done", "total", "bytes_per_second",
        "seconds_left"}; unknown = None.
        """
        files = [vars(file).copy() for file in self._files.values()]
        done, total = sum(file["done"] for file in files), sum(file["size"] for file in files)
        speed = None
        if len(self._samples) > 1:
            (since, before), (now, after) = self._samples[0], self._samples[-1]
            speed = (after - before) / (now - since) if now > since else None
        return {
            "phase": self._phase,
            "files": files,
            "done": done,
            "total": total,
            "bytes_per_second": speed,
            "seconds_left": (total - done) / speed if speed else None,
        }

    def _news(self) -> None:
        self._tell(self.snapshot())
