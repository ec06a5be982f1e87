"""Who waits, who begins and how much prompt a step computes. No torch and no model: a plan is made
of token counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence as Several
from dataclasses import dataclass, field

from chat.engine.request import RequestRefused
from chat.engine.sequence import Sequence
from chat.engine.token_budget import TokenBudget
from chat.engine.waiting_queue import WaitingQueue

QUEUE_REPORT_INTERVAL = 0.5  # seconds between queue position updates


@dataclass(frozen=True)
class Schedule:
    """The prompt part of one step.

    counts: prompt tokens of each sequence that is being prefilled already, in their order.
    admitted: waiting sequences that begin now, and prompt tokens of each; sorted by that number, so
    that neighbours can share a rectangle; one whose prompt is cut comes last.
    """

    counts: list[int] = field(default_factory=list)
    admitted: list[tuple[Sequence, int]] = field(default_factory=list)


class Scheduler:
    """The requests that have no terminal event yet, and those of them that wait.

    whole_prompts: a prompt is computed in one step or not at all (a bidirectional one). Its lock is
    the engine's only one: `submit`, `abort` and `close` may be called on any thread.
    """

    def __init__(
        self, *, max_rows: int, queue_limit: int, prefill_tokens: int, whole_prompts: bool
    ):
        self.max_rows, self.queue_limit = max_rows, queue_limit
        self.budget = TokenBudget(prefill_tokens)
        self._whole_prompts = whole_prompts
        self._changed = threading.Condition()
        self._waiting: WaitingQueue[Sequence] = WaitingQueue()
        self._unfinished: dict[str, Sequence] = {}  # by request id
        self._closed = False
        self._reported_at = 0.0

    # -- any thread

    @property
    def closed(self) -> bool:
        return self._closed

    def counts(self) -> tuple[int, int]:
        """Requests that wait, and that run."""
        with self._changed:
            waiting = len(self._waiting)
            return waiting, len(self._unfinished) - waiting

    def check_room(self, request_id: str, user: str = "") -> None:
        """Raises RequestRefused when this request would not be taken now."""
        with self._changed:
            self._check_room(request_id, user)

    def submit(self, sequence: Sequence) -> None:
        """Put a sequence into the queue. Raises RequestRefused."""
        with self._changed:
            self._check_room(sequence.id, sequence.user)
            self._unfinished[sequence.id] = sequence
            self._waiting.push(sequence)
            self._changed.notify_all()

    def _check_room(self, request_id: str, user: str) -> None:
        if self._closed:
            raise RequestRefused("queue_full", "the engine is shutting down", retry_after=5)
        if request_id in self._unfinished:
            raise RequestRefused(
                "invalid_value", f"request {request_id!r} is already running", param="id"
            )
        if len(self._waiting) >= self.queue_limit:
            raise RequestRefused(
                "queue_full",
                f"{len(self._waiting)} requests are waiting already, more are not taken",
                retry_after=self.budget.retry_after(),
            )
        # Half of what the others leave free, so that the line is never full for whoever comes next.
        own = self._waiting.count(user)
        if user and own > (self.queue_limit - (len(self._waiting) - own)) // 2:
            raise RequestRefused(
                "queue_full",
                f"{own} requests of yours are waiting already, more are not taken",
                retry_after=self.budget.retry_after(),
            )

    def abort(self, request_id: str) -> None:
        with self._changed:
            sequence = self._unfinished.get(request_id)
            if sequence is not None:
                sequence.aborted = True
                self._changed.notify_all()

    def close(self) -> None:
        """Take nothing more; abort what there is."""
        with self._changed:
            self._closed = True
            for sequence in self._unfinished.values():
                sequence.aborted = True
            self._changed.notify_all()

    # -- the engine's thread

    def wait(self, stop_event: threading.Event, timeout: float = 1.0) -> None:
        """Until something waits or is to be aborted, or the scheduler is closed."""
        with self._changed:
            due = self._waiting or any(each.aborted for each in self._unfinished.values())
            if not due and not stop_event.is_set():
                self._changed.wait(timeout)

    def take_aborted(self) -> list[Sequence]:
        """The unfinished sequences that are to end; those that waited wait no more."""
        with self._changed:
            aborted = [sequence for sequence in self._unfinished.values() if sequence.aborted]
            for sequence in aborted:
                if sequence.waiting:
                    self._waiting.remove(sequence)
        return aborted

    def schedule(self, prefilling: Several[Sequence], decoding: int) -> Schedule:
        """Share out the step's prompt tokens: first to those that are being prefilled, what is left
        to those that wait. decoding: sequences past their prompt, which hold rows too.
        """
        with self._changed:
            budget = self.budget.prefill_budget(len(self._waiting), decoding)
            counts = []
            for sequence in prefilling:
                counts.append(min(budget, sequence.uncomputed))
                budget -= counts[-1]
            return Schedule(counts, self._admit(budget, len(prefilling), decoding))

    def _admit(self, budget: int, prefilling: int, decoding: int) -> list[tuple[Sequence, int]]:
        admitted: list[tuple[Sequence, int]] = []
        while budget > 0 and prefilling + decoding + len(admitted) < self.max_rows:
            sequence = self._waiting.peek()
            if sequence is None:
                break
            size = len(sequence.prompt)
            if size > budget:
                if not self._whole_prompts:
                    size = budget
                elif admitted or prefilling:
                    break
            self._waiting.pop()
            sequence.waiting = False
            admitted.append((sequence, size))
            budget -= size
        return sorted(admitted, key=lambda entry: (entry[1] < len(entry[0].prompt), entry[1]))

    def forget(self, sequence: Sequence) -> None:
        """It has had its terminal event."""
        with self._changed:
            self._unfinished.pop(sequence.id, None)

    def report_queue_positions(self) -> None:
        """Tell those that wait how many are before them: at once when new, then now and again."""
        now = time.monotonic()
        due = now - self._reported_at >= QUEUE_REPORT_INTERVAL
        with self._changed:
            waiting = list(self._waiting)
        for position, sequence in enumerate(waiting):
            if due or sequence.reported_queue_position is None:
                sequence.report_queue_position(position)
        if due:
            self._reported_at = now
