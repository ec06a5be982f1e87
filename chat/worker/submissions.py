"""Tokenising and adapter loading, off the event loop: on one thread, users in turn, the calls of
one user in their order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from chat.engine.waiting_queue import WaitingQueue


@dataclass(eq=False)
class _Call:
    user: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    future: Future[Any] = field(default_factory=Future)


class Submissions:
    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="submit")
        self._waiting: WaitingQueue[_Call] = WaitingQueue()
        self._lock = threading.Lock()

    def submit(self, user: str, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        call = _Call(user, work, arguments)
        with self._lock:
            self._waiting.push(call)
        self._thread.submit(self._next)
        return call.future

    def shutdown(self) -> None:
        """What has not begun is cancelled."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            while self._waiting:
                self._waiting.pop().future.cancel()

    def _next(self) -> None:
        with self._lock:
            if not self._waiting:
                return
            call = self._waiting.pop()
        if not call.future.set_running_or_notify_cancel():
            return
        try:
            call.future.set_result(call.work(*call.arguments))
        except BaseException as error:
            call.future.set_exception(error)
