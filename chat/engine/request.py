"""What goes into the engine and what comes out: the contract between engine, worker server and web
tier.

No torch here, so that the web process can import it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "abort", "error"]
EventType = Literal["loading", "queued", "started", "delta", "finished", "failed"]

LONGEST_PREFIX = 2048  # tokens of an adapter: nothing longer is trained or imported
DEFAULT_NEW_TOKENS = 512
MOST_STOPS = 4  # as many as OpenAI's API takes
MOST_BIASES = 1024  # entries of a logit_bias


@dataclass(frozen=True)
class Limits:
    """What a number may be. `above`: more than `low`, not `low` itself."""

    kind: type  # float takes whole numbers too
    low: float
    high: float
    above: bool = False

    def __contains__(self, value: float) -> bool:
        # not-a-number lies nowhere
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        if self.above:
            return f"above {self.low:,}, at most {self.high:,}"
        return f"{self.low:,} to {self.high:,}"


def _limited(default: Any, *limits: Any, **more: Any) -> Any:
    return field(default=default, metadata={"limits": Limits(*limits, **more)})


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are ChatGLM-6B's
    (docs/chatglm.md#7-chat-format).

    The one table of names, defaults and limits: engine, forms, serializers, commands and doors
    read them here (LIMITS, DEFAULTS).
    """

    do_sample: bool = True
    temperature: float = _limited(0.95, float, 0, 2)  # 0 means greedy, as do_sample=False
    top_p: float = _limited(0.7, float, 0, 1, above=True)
    # 0 means off; its own chat has 50 without saying so
    top_k: int = _limited(50, int, 0, 1_000_000)
    repetition_penalty: float = _limited(1.0, float, 0.01, 10)
    # of tokens that the answer has: subtracted once, and as often as they occurred (OpenAI's)
    presence_penalty: float = _limited(0.0, float, -2, 2)
    frequency_penalty: float = _limited(0.0, float, -2, 2)
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, -100 to 100, added to its score)
    # None: DEFAULT_NEW_TOKENS; never more than the prompt leaves of the context
    max_new_tokens: int | None = _limited(None, int, 1, 1_000_000)
    # prompt and answer together (ChatGLM api.py), cut to the context; without max_new_tokens
    max_length: int | None = _limited(None, int, 1, 1_000_000)
    # whether a model that can think before it answers does; None: as its template has it
    thinking: bool | None = None
    json_schema: str | None = None  # a JSON schema, as text, that the answer satisfies
    stop: tuple[str, ...] = ()  # at most MOST_STOPS, none empty
    # None: drawn by the engine; same seed, same prompt, same tokens, whatever shares the batch
    seed: int | None = _limited(None, int, 0, 2**63 - 1)
    # of the adapter: what attention gives to the prefix's columns is multiplied by it; 1: as it was
    # trained, 0: prefix off
    prefix_strength: float = _limited(1.0, float, 0, 2)
    # number of alternatives to report with each token; None: no logprobs
    logprobs: int | None = _limited(None, int, 0, 20)

    def check(self, vocabulary: int = 2**31) -> None:
        """Raises RequestRefused("invalid_value") naming the parameter. vocabulary: how many token
        ids there are.
        """

        def refuse(name: str, allowed: object) -> None:
            message = f"{name} must be {allowed}, not {getattr(self, name)!r}"
            raise RequestRefused("invalid_value", message, param=name)

        for name, limits in LIMITS.items():
            value = getattr(self, name)
            if value is None and DEFAULTS[name] is None:
                continue
            if value not in limits:
                refuse(name, limits)
        if len(self.stop) > MOST_STOPS or not all(self.stop):
            refuse("stop", f"at most {MOST_STOPS} strings, none of them empty")
        if len(self.logit_bias) > MOST_BIASES or not all(
            0 <= token < vocabulary and -100 <= bias <= 100 for token, bias in self.logit_bias
        ):
            tokens = f"token ids (0 to {vocabulary - 1}) with -100 to 100 each"
            refuse("logit_bias", f"at most {MOST_BIASES} {tokens}")

    def new_tokens_limit(self, prompt: int, room: int, prefix: int = 0) -> int:
        """Tokens that the answer to a prompt of `prompt` tokens may have, where both have `room`
        (behind an adapter of `prefix` tokens): what was asked for, or as many as the prompt leaves.
        Clients ask for their own default (4096, 32000), so more than fits is no reason to refuse.
        """
        behind = f" behind the adapter's prefix of {prefix}" if prefix else ""
        if prompt + 1 > room:
            raise RequestRefused(
                "context_length_exceeded",
                f"the context holds {max(room, 0)} tokens{behind}; the prompt has {prompt}",
                param="messages",
            )
        wanted = self.max_new_tokens
        if wanted is None and self.max_length is not None:
            # one token at least, as ChatGLM's own generate
            return max(1, min(self.max_length, room) - prompt)
        return min(wanted or DEFAULT_NEW_TOKENS, room - prompt)


LIMITS: dict[str, Limits] = {
    found.name: found.metadata["limits"]
    for found in fields(SamplingParams)
    if "limits" in found.metadata
}
DEFAULTS: dict[str, Any] = {found.name: found.default for found in fields(SamplingParams)}


@dataclass(frozen=True)
class AdapterRef:
    """A tuned artefact as the worker can find it: it loads `folder` on first use and keeps it under
    `name`.

    `name` is unique and never reused for other content (the portal uses the adapter's sha256).
    """

    name: str
    folder: str


@dataclass(frozen=True)
class CheckpointRef:
    """Which base weights a request needs. folder: where they lie on this machine, if they do.
    chosen: they are what workers are to serve, though one may not have noticed yet.
    """

    name: str
    fingerprint: str
    folder: str = ""
    chosen: bool = False


@dataclass(frozen=True)
class Request:
    """One answer to be generated.

    One of `messages` (rendered by the checkpoint's own chat template), `text` (gone on with as it
    stands) and `prompt_ids` (already tokens).
    """

    id: str
    # {"role": Role, "content": str}, oldest first, last one from the user or a tool; an assistant's
    # may have "tool_calls", a tool's "tool_call_id" and "name", in OpenAI's form
    messages: tuple[dict[str, Any], ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    text: str | None = None
    begun: str = ""  # the answer's beginning, which is there already; with `messages`
    # functions that the answer may call, in OpenAI's form (chat/engine/tools.py); with `messages`
    tools: tuple[dict[str, Any], ...] = ()
    must_call: tuple[str, ...] = ()  # their names, one of which it calls; none: as it likes
    adapter: AdapterRef | None = None  # None: prefix off
    sampling: SamplingParams = field(default_factory=SamplingParams)
    user: str = ""  # admission is round-robin over users
    # the text as its tokens spell it, without the family's tidying (Prompter.clean)
    untidied: bool = False
    # what the answer may resemble (another model's answer): makes a greedy one quicker where it
    # does, and never another
    resembles: str = ""


@dataclass(frozen=True)
class Event:
    """One entry of a sequence's log. `seq` starts at 1 and rises by 1 per event of that sequence.

    type        data
    loading     {"checkpoint", "phase", "seconds", "usual_seconds"}     waits for its model
    queued      {"position": int}                        0: next to be admitted
    started     {"prompt_tokens": int}
    delta       {"text": str, "tokens": int, "logprobs"?: [...]}
                text may be several tokens, never half a character; what a model thinks stands at
                the answer's beginning (chat/engine/thoughts.py)
    finished    {"finish_reason": FinishReason,
                 "usage": {"prompt_tokens", "completion_tokens", "total_tokens",
                           "max_tokens"? (fewer than asked for: all that the context left)},
                 "timings": {"queued_s", "prefill_s", "decode_s", "tokens_per_second"}}    terminal
    failed      {"error": {"message", "type", "param", "code"}, "usage"?, "timings"?}      terminal
    """

    id: str
    seq: int
    type: EventType
    data: dict[str, Any]

    @property
    def terminal(self) -> bool:
        return self.type in ("finished", "failed")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Sink = Callable[[Event], None]  # called on the engine's thread; must not block


def error_object(
    message: str, code: str, type: str = "server_error", param: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object, as events and rows carry it."""
    return {"message": message, "type": type, "param": param, "code": code}


def interrupted(message: str) -> dict[str, Any]:
    """Of an answer that nobody asked to end and that did not reach its end."""
    return error_object(message, "interrupted")


class GenerationRefused(Exception):
    """Nobody takes the request, or goes on with it. `later`: it says nothing about the request
    itself, which may be sent again after `retry_after` seconds (None: nobody knows).
    """

    def __init__(
        self,
        code: str,
        message: str,
        param: str | None = None,
        retry_after: int | None = None,
        later: bool = True,
    ):
        super().__init__(message)
        self.code, self.message, self.param = code, message, param
        self.retry_after, self.later = retry_after, later

    def as_error(self) -> dict[str, Any]:
        kind = "server_error" if self.later else "invalid_request_error"
        return error_object(self.message, self.code, kind, self.param)


class RequestRefused(GenerationRefused):
    """The engine will not take the request; nothing was computed.

    `code`: context_length_exceeded | queue_full | invalid_adapter | invalid_value | empty_prompt |
    template_refused | unsupported_parameter | unavailable (an upstream server's word)
    """

    def __init__(
        self, code: str, message: str, param: str | None = None, retry_after: int | None = None
    ):
        later = code in ("queue_full", "unavailable")
        super().__init__(code, message, param, retry_after, later)
