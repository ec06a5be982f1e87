"""One request on its way through the engine: its tokens, its text, its events."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chat.engine.drafts import Drafter
from chat.engine.positions import PositionPlan
from chat.engine.prompts import Prompter
from chat.engine.request import Event, EventType, FinishReason, Request, Sink, error_object

if TYPE_CHECKING:
    import torch

    from chat.engine.sampler import SampledToken, SamplerState

OnEnd = Callable[["Sequence"], None]


class StopStrings:
    """Finds the first stop string in a stream of text, also across token borders.

    Text that may be the beginning of a stop string is held back until it is clear that it is none.
    """

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._pending = ""
        self.hit = False

    def feed(self, piece: str) -> str:
        self._pending += piece
        found = [at for at in (self._pending.find(stop) for stop in self._stops) if at >= 0]
        if found:
            text, self._pending, self.hit = self._pending[: min(found)], "", True
            return text
        held_back = max((self._overlap(stop) for stop in self._stops), default=0)
        end = len(self._pending) - held_back
        text, self._pending = self._pending[:end], self._pending[end:]
        return text

    def flush(self) -> str:
        text, self._pending = self._pending, ""
        return text

    def _overlap(self, stop: str) -> int:
        for size in range(min(len(stop) - 1, len(self._pending)), 0, -1):
            if self._pending.endswith(stop[:size]):
                return size
        return 0


@dataclass(eq=False)
class Sequence:
    """Belongs to the engine's thread once it is submitted.

    kv_length: columns of the slot that are filled (a prefix that is there included).
    num_computed_tokens: prompt tokens whose keys and values are in the slot. positions: where its
    tokens stand. prefix: of its adapter, until it has been copied into the slot; shared_prefix:
    the same where it is read from where it lies. prefix_columns: those of the slot that it fills.
    drafter: guesses at the answer, made when they are first of use.
    """

    request: Request
    prompt: list[int]
    sink: Sink
    prompter: Prompter
    sampler_state: SamplerState
    positions: PositionPlan
    new_tokens_limit: int
    prefix: torch.Tensor | None = None
    shared_prefix: torch.Tensor | None = None
    prefix_columns: int = 0
    on_end: OnEnd | None = None
    waiting: bool = True  # in the scheduler's queue
    slot: int = -1
    kv_length: int = 0
    num_computed_tokens: int = 0
    output_ids: list[int] = field(default_factory=list)
    drafter: Drafter | None = None
    aborted: bool = False
    finished: bool = False
    finish_reason: FinishReason | None = None
    error: dict[str, Any] | None = None
    text_pieces: list[str] = field(default_factory=list)
    reported_queue_position: int | None = None
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    _number: int = 0
    _undelivered: list[dict[str, Any]] = field(default_factory=list)
    _silent_tokens: int = 0

    def __post_init__(self) -> None:
        self._stream = self.prompter.detokenizer()
        self._stops = (
            StopStrings(self.request.sampling.stop) if self.request.sampling.stop else None
        )
        self._cleaner = None if self.request.untidied else self.prompter.cleaner()
        goes_on = not self.request.messages or self.request.begun
        self._opening = "" if goes_on else self.prompter.opening(self.prompt)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def user(self) -> str:
        return self.request.user

    @property
    def adapter_name(self) -> str:
        return self.request.adapter.name if self.request.adapter else ""

    @property
    def before_prompt(self) -> str:
        """What the prompt's keys and values depend on, besides its tokens: who has the same may
        share them.
        """
        bias = self.positions.prefix_bias
        return f"{self.adapter_name}{bias:+.9f}" if bias else self.adapter_name

    @property
    def uncomputed(self) -> int:
        """Prompt tokens whose keys and values are not in the slot yet."""
        return len(self.prompt) - self.num_computed_tokens

    @property
    def prefilled(self) -> bool:
        return self.uncomputed == 0

    @property
    def computed(self) -> list[int]:
        """The tokens, prompt and answer, whose keys and values are in the slot."""
        return (self.prompt + self.output_ids)[: self.kv_length - self.prefix_columns]

    @property
    def text(self) -> str:
        return "".join(self.text_pieces)

    # -- events

    def emit(self, kind: EventType, data: dict[str, Any]) -> None:
        """Hand an event to the reader. A reader that raises loses its request, nothing else."""
        self._number += 1
        try:
            self.sink(Event(self.request.id, self._number, kind, data))
        except Exception:
            self.aborted = True

    def report_queue_position(self, position: int) -> None:
        if position != self.reported_queue_position:
            self.reported_queue_position = position
            self.emit("queued", {"position": position})

    def start(self) -> None:
        self.started_at = time.monotonic()
        self.emit("started", {"prompt_tokens": len(self.prompt)})

    def append_token(self, sampled: SampledToken) -> None:
        """One more token of the answer, which may complete it."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        token = sampled.token
        if token is None:
            self.fail(
                "the model's output for this request is not finite", "server_error", "nan_logits"
            )
            return
        self.output_ids.append(token)
        self.sampler_state.take(token)
        self._silent_tokens += 1
        if sampled.logprobs is not None:
            self._undelivered.append(self._logprob_entry(sampled.logprobs))
        if token in self.prompter.end_ids:
            self.finish("stop")
            return
        self._deliver(self._stream.step(token))
        if self._stops is not None and self._stops.hit:
            self.finish("stop")
        elif len(self.output_ids) >= self.new_tokens_limit:
            self.finish("length")

    def _deliver(self, text: str, final: bool = False) -> None:
        stopped = self._stops is not None and self._stops.hit
        if self._stops is not None and not stopped:
            text = self._stops.feed(text)
            if final and not self._stops.hit:
                text += self._stops.flush()
        elif stopped:
            text = ""
        if self._cleaner is not None:
            text = self._cleaner.feed(text)
            if final:
                text += self._cleaner.flush()
        if not text and not (final and self._undelivered):
            return
        text, self._opening = self._opening + text, ""
        self.text_pieces.append(text)
        data: dict[str, Any] = {"text": text, "tokens": self._silent_tokens}
        if self._undelivered:
            data["logprobs"], self._undelivered = self._undelivered, []
        self._silent_tokens = 0
        self.emit("delta", data)

    def _logprob_entry(self, entries: list[tuple[int, float]]) -> dict[str, Any]:
        """OpenAI's form of one token's logprobs."""

        def spelled(token: int, logprob: float) -> dict[str, Any]:
            text = self.prompter.token_text(token)
            return {
                "token": text,
                "token_id": token,
                "logprob": max(logprob, -9999.0),
                "bytes": list(text.encode()),
            }

        return {**spelled(*entries[0]), "top_logprobs": [spelled(*entry) for entry in entries[1:]]}

    # -- the end

    def finish(self, reason: FinishReason) -> None:
        if self.finished:
            return
        self._deliver(self._stream.flush(), final=True)
        self.finish_reason = reason
        self._close("finished", {"finish_reason": reason})

    def fail(self, message: str, kind: str, code: str) -> None:
        if self.finished:
            return
        self.finish_reason = "error"
        self.error = error_object(message, code, kind)
        self._close("failed", {"error": self.error})

    def _close(self, kind: EventType, data: dict[str, Any]) -> None:
        self.finished, self.ended_at = True, time.monotonic()
        self.emit(kind, {**data, "usage": self.usage(), "timings": self.timings()})
        if self.on_end is not None:
            self.on_end(self)

    def usage(self) -> dict[str, int]:
        """OpenAI's counts; `max_tokens` is there where the context left less room than was asked
        for.
        """
        prompt, completion = len(self.prompt), len(self.output_ids)
        counts = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        if self.new_tokens_limit < (self.request.sampling.max_new_tokens or 0):
            counts["max_tokens"] = self.new_tokens_limit
        return counts

    def timings(self) -> dict[str, float]:
        """Seconds spent waiting, in prefill (to the first token) and decoding; tokens per second of
        decoding.
        """
        now = self.ended_at or time.monotonic()
        start = self.started_at if self.started_at is not None else now
        first = self.first_token_at if self.first_token_at is not None else now
        decode = now - first
        after_first = max(0, len(self.output_ids) - 1)
        return {
            "queued_s": start - self.submitted_at,
            "prefill_s": first - start,
            "decode_s": decode,
            "tokens_per_second": after_first / decode if decode > 0 else 0.0,
        }
