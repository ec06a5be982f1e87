"""Answers collected whole, for callers that want no stream: evaluation, the terminal, tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chat.engine.request import FinishReason, Request, RequestRefused, Sink
from chat.engine.sequence import OnEnd, Sequence


@dataclass(frozen=True)
class GenerationOutput:
    """What became of one request. `error` is OpenAI's error object, or None."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: dict[str, int]
    error: dict[str, Any] | None = None


class OutputCollector:
    """`answers` by request id; filled on the engine's thread, waited for on another."""

    def __init__(self) -> None:
        self.outputs: dict[str, GenerationOutput] = {}
        self._changed = threading.Condition()

    def submit(
        self, request: Request, submit: Callable[[Request, Sink, OnEnd], None], wait: bool
    ) -> bool:
        """Hand a request in. False: the queue is full, try again (only if `wait`); any other
        refusal is its answer.
        """
        try:
            submit(request, lambda event: None, self._on_end)
        except RequestRefused as refusal:
            if refusal.code == "queue_full" and wait:
                return False
            usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
            self.outputs[request.id] = GenerationOutput(
                request.id, "", (), "error", usage, refusal.as_error()
            )
        return True

    def wait(self, seconds: float = 0.05) -> None:
        with self._changed:
            self._changed.wait(timeout=seconds)

    def _on_end(self, sequence: Sequence) -> None:
        reason = sequence.finish_reason or "error"
        output = GenerationOutput(
            sequence.id,
            sequence.text,
            tuple(sequence.output_ids),
            reason,
            sequence.usage(),
            sequence.error,
        )
        with self._changed:
            self.outputs[sequence.id] = output
            self._changed.notify_all()
