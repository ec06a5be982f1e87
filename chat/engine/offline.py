"""Answers collected whole, for callers that want no stream: evaluation, the terminal, tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chat.engine.request import FinishReason, Request, RequestRefused, Sink
from chat.engine.sequence import Ended, Sequence


@dataclass(frozen=True)
class Answer:
    """What became of one request. `error` is OpenAI's error object, or None."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: dict[str, int]
    error: dict[str, Any] | None = None


class AnswerCollector:
    """`answers` by request id; filled on the engine's thread, waited for on another."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self._changed = threading.Condition()

    def submit(
        self, request: Request, submit: Callable[[Request, Sink, Ended], None], wait: bool
    ) -> bool:
        """Hand a request in. False: the queue is full, try again (only if `wait`); any other
        refusal is its answer.
        """
        try:
            submit(request, lambda event: None, self._ended)
        except RequestRefused as refusal:
            if refusal.code == "queue_full" and wait:
                return False
            usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
            self.answers[request.id] = Answer(
                request.id, "", (), "error", usage, refusal.as_error()
            )
        return True

    def wait(self, seconds: float = 0.05) -> None:
        with self._changed:
            self._changed.wait(timeout=seconds)

    def _ended(self, sequence: Sequence) -> None:
        reason = sequence.finish_reason or "error"
        answer = Answer(
            sequence.id,
            sequence.text,
            tuple(sequence.answer),
            reason,
            sequence.usage(),
            sequence.error,
        )
        with self._changed:
            self.answers[sequence.id] = answer
            self._changed.notify_all()
