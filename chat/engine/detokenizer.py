"""Answers' tokens to text as they come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


def detokenizer(tokenizer: Any) -> IncrementalDetokenizer:
    """An incremental decode of one answer."""
    backend = getattr(tokenizer, "_tokenizer", None)
    if backend is not None and type(backend).__module__.startswith("tokenizers"):
        return FastIncrementalDetokenizer(backend, tokenizer)
    return SlowIncrementalDetokenizer(tokenizer)


class IncrementalDetokenizer(ABC):
    """Tokens to text, one by one: never half a character, constant time a token."""

    @abstractmethod
    def step(self, token_id: int) -> str:
        """The text that this token completes; often empty inside a multi-byte character."""

    @abstractmethod
    def flush(self) -> str:
        """What was held back at the end, incomplete characters as U+FFFD."""


class SlowIncrementalDetokenizer(IncrementalDetokenizer):
    """Decodes a short window twice and gives out the difference: right for any tokenizer, about 5
    microseconds a token.
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(ids)
        self._start = self._read = 0  # the window's start, and where its unread part begins

    def step(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._advance(final=False)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        decode = self._tokenizer.decode
        before = decode(self._ids[self._start : self._read], skip_special_tokens=True)
        now = decode(self._ids[self._start :], skip_special_tokens=True)
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]


class FastIncrementalDetokenizer(IncrementalDetokenizer):
    """tokenizers' own DecodeStream: about 1 microsecond a token at any length (design measurement:
    23-102 for a re-decode).
    """

    def __init__(self, backend: Any, tokenizer: Any):
        self._stream = DecodeStream(skip_special_tokens=True)
        self._backend, self._tokenizer = backend, tokenizer
        self._held: list[int] = []  # since the last text that came out, for the flush
        # the tokens of that text: context in which the held ones are spelled
        self._last: list[int] = []
        self._fallback: SlowIncrementalDetokenizer | None = None

    def step(self, token_id: int) -> str:
        if self._fallback is not None:
            return self._fallback.step(token_id)
        self._held.append(token_id)
        try:
            text = self._stream.step(self._backend, token_id)
        except Exception:
            # the stream raises a bare Exception on a decoder that rewrites its own prefix
            self._fallback = self._window()
            return self._fallback._advance(final=False)
        if not text:
            return ""
        self._last, self._held = self._held, []
        return text

    def flush(self) -> str:
        if self._fallback is None:
            if not self._held:
                return ""
            self._fallback = self._window()
        return self._fallback.flush()

    def _window(self) -> SlowIncrementalDetokenizer:
        window = SlowIncrementalDetokenizer(self._tokenizer, [*self._last, *self._held])
        window._read = len(self._last)
        return window
