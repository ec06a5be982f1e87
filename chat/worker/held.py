"""Sequences that wait in the worker until their checkpoint has been loaded, told every few seconds
how far it is. All of it on the event loop's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from chat.engine.request import Event, Request, error_object
from chat.worker.serving import PAUSED, Coming
from chat.worker.subscriptions import SequenceState

TELL_EVERY = 2.0  # seconds
NO_TIMINGS = {"queued_s": 0.0, "prefill_s": 0.0, "decode_s": 0.0, "tokens_per_second": 0.0}
NO_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


@dataclass(eq=False)
class Held:
    """fingerprint: of the checkpoint it waits for. since: time.monotonic()."""

    sequence: SequenceState
    request: Request
    fingerprint: str
    since: float = field(default_factory=time.monotonic)
    told_at: float = 0.0
    told_phase: str = ""


class Waiting:
    """What is held, in order of arrival. changed(sequence): its log has grown."""

    def __init__(self, longest: float, changed: Callable[[SequenceState], None]):
        self._longest, self._changed = longest, changed
        self._held: dict[str, Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, sequence: SequenceState, request: Request, fingerprint: str) -> None:
        self._held[sequence.id] = Held(sequence, request, fingerprint)

    def take(self, ready: Callable[[str], bool]) -> Iterator[Held]:
        """Those whose checkpoint is `ready(fingerprint)`; they are not held any more."""
        for held in list(self._held.values()):
            if ready(held.fingerprint):
                yield self._held.pop(held.sequence.id)

    def abort(self, id: str) -> bool:
        """False: it is not held."""
        held = self._held.pop(id, None)
        if held is not None:
            self._end(held)
        return held is not None

    def abort_all(self) -> None:
        for id in list(self._held):
            self.abort(id)

    def fail(self, held: Held, code: str, message: str) -> None:
        self._append(held, "failed", {"error": error_object(message, code)})

    def tell(self, coming: Coming | None) -> None:
        """How far it is; whoever has waited too long is told that."""
        now = time.monotonic()
        for held in list(self._held.values()):
            if now - held.since > self._longest:
                del self._held[held.sequence.id]
                paused = coming is not None and coming.phase == PAUSED
                what = "paused for a run" if paused else "being loaded"
                message = f"the model was still {what} after {self._longest:.0f} s"
                self.fail(held, "chat_paused" if paused else "worker_loading", message)
                continue
            mine = coming is not None and coming.target.fingerprint == held.fingerprint
            phase = coming.phase if mine and coming is not None else "waiting"
            if phase != held.told_phase or now - held.told_at > TELL_EVERY:
                held.told_phase, held.told_at = phase, now
                known: dict[str, Any] = {"phase": phase, "seconds": int(now - held.since)}
                if mine and coming is not None:
                    known = coming.told()
                self._append(held, "loading", known)
                held.sequence.notices += 1

    def _end(self, held: Held) -> None:
        data: dict[str, Any] = {"finish_reason": "abort", "usage": NO_USAGE, "timings": NO_TIMINGS}
        if held.sequence.cause:
            data["cause"] = held.sequence.cause
        self._append(held, "finished", data)

    def _append(self, held: Held, kind: Any, data: dict[str, Any]) -> None:
        sequence = held.sequence
        sequence.append(Event(sequence.id, sequence.last + 1, kind, data))
        self._changed(sequence)
