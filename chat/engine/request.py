"""What goes into the engine and what comes out: the contract between engine, worker server and web
tier.

No torch here, so that the web process can import it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "abort", "error"]

# tokens of an adapter: room the engine keeps in each row, so nothing longer is trained
LONGEST_PREFIX = 256
DEFAULT_NEW_TOKENS = 512


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are ChatGLM-6B's (SPEC 5, "Chat")."""

    do_sample: bool = True
    temperature: float = 0.95  # 0 means greedy, as do_sample=False
    top_p: float = 0.7
    top_k: int = 50  # 0 means off; upstream's chat has 50 without saying so
    repetition_penalty: float = 1.0
    # None: DEFAULT_NEW_TOKENS or what the context leaves; a number must fit
    max_new_tokens: int | None = None
    max_length: int | None = (
        # prompt and answer together (ChatGLM api.py), cut to the context; without max_new_tokens
        None
    )
    stop: tuple[str, ...] = ()
    # None: drawn by the engine; same seed, same prompt, same tokens, whatever shares the batch
    seed: int | None = None
    # number of alternatives to report with each token; None: no logprobs
    logprobs: int | None = None


@dataclass(frozen=True)
class AdapterRef:
    """A tuned artefact as the worker can find it: it loads `folder` on first use and keeps it under
    `name`.

    `name` is unique and never reused for other content (the portal uses the adapter's sha256).
    """

    name: str
    folder: str


@dataclass(frozen=True)
class Request:
    """One answer to be generated.

    Either `messages` (rendered by the checkpoint's own chat template) or `prompt_ids` (already
    tokens), never both.
    """

    id: str
    # {"role": Role, "content": str}, oldest first, last one from the user
    messages: tuple[dict[str, str], ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    adapter: AdapterRef | None = None  # None: prefix off
    sampling: Sampling = field(default_factory=Sampling)
    user: str = ""  # admission is round-robin over users


@dataclass(frozen=True)
class Event:
    """One entry of a sequence's log. `seq` starts at 1 and rises by 1 per event of that sequence.

    type        data
    queued      {"position": int}                        0: next to be admitted
    started     {"prompt_tokens": int}
    delta       {"text": str, "tokens": int, "logprobs"?: [...]}
                text may be several tokens, never half a character
    finished    {"finish_reason": FinishReason,
                 "usage": {"prompt_tokens", "completion_tokens", "total_tokens"},
                 "timings": {"queued_s", "prefill_s", "decode_s", "tokens_per_second"}}    terminal
    failed      {"error": {"message", "type", "param", "code"}, "usage"?, "timings"?}      terminal
    """

    id: str
    seq: int
    type: Literal["queued", "started", "delta", "finished", "failed"]
    data: dict[str, Any]

    @property
    def terminal(self) -> bool:
        return self.type in ("finished", "failed")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Sink = Callable[[Event], None]  # called on the engine's thread; must not block


class RequestRefused(Exception):
    """The engine will not take the request; nothing was computed.

    `code`: context_length_exceeded | queue_full | invalid_adapter | invalid_value | empty_prompt
    """

    def __init__(
        self, code: str, message: str, param: str | None = None, retry_after: int | None = None
    ):
        super().__init__(message)
        self.code, self.message, self.param, self.retry_after = code, message, param, retry_after

    def as_error(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.code == "queue_full" else "invalid_request_error"
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}
