"""Answers' tokens to text as they come: incremental decoding, and ChatGLM's cleaning of what was
decoded.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


def text_stream(tokenizer: Any) -> TextStream:
    """An incremental decode of one answer."""
    if hasattr(tokenizer, "stream"):  # ChatGLM's own
        return tokenizer.stream()
    backend = getattr(tokenizer, "_tokenizer", None)
    if backend is not None and type(backend).__module__.startswith("tokenizers"):
        return _BackendStream(backend, tokenizer)
    return _WindowStream(tokenizer)


class TextStream(ABC):
    """Tokens to text, one by one: never half a character, constant time a token."""

    @abstractmethod
    def step(self, token_id: int) -> str:
        """The text that this token completes; often empty inside a multi-byte character."""

    @abstractmethod
    def flush(self) -> str:
        """What was held back at the end, incomplete characters as U+FFFD."""


class _WindowStream(TextStream):
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


class _BackendStream(TextStream):
    """tokenizers' own DecodeStream: about 1 microsecond a token at any length (design measurement:
    23-102 for a re-decode).
    """

    def __init__(self, backend: Any, tokenizer: Any):
        self._stream = DecodeStream(skip_special_tokens=True)
        self._backend, self._tokenizer = backend, tokenizer
        self._held: list[int] = []  # since the last text that came out, for the flush
        # the tokens of that text: context in which the held ones are spelled
        self._last: list[int] = []
        self._fallback: _WindowStream | None = None

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

    def _window(self) -> _WindowStream:
        window = _WindowStream(self._tokenizer, [*self._last, *self._held])
        window._read = len(self._last)
        return window


TRAINING_TIME, TRAINING_TIME_ANSWER = "[[训练时间]]", "2023年"
_MARKS = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}


def clean_chatglm(text: str) -> str:
    """Upstream's process_response (SPEC 5): strip, fill in the training time, full-width marks
    beside Chinese characters.
    """
    return _widen(text.strip().replace(TRAINING_TIME, TRAINING_TIME_ANSWER))


def _widen(text: str) -> str:
    for narrow, wide in _MARKS.items():
        text = re.sub(f"([\u4e00-\u9fff]){re.escape(narrow)}", rf"\1{wide}", text)
        text = re.sub(f"{re.escape(narrow)}([\u4e00-\u9fff])", rf"{wide}\1", text)
    return text


class AnswerCleaner:
    """`clean_chatglm` on a stream. Text whose cleaning still depends on what follows is held back.

    feed(piece) + ... + flush() is clean_chatglm(all pieces), in time linear in the text.
    """

    def __init__(self) -> None:
        self._pending = ""  # raw, not yet given out
        self._before = ""  # the last character given out, context for a mark that follows
        self._started = False

    def feed(self, piece: str) -> str:
        self._pending += piece
        if not self._started:
            self._pending = self._pending.lstrip()
            self._started = bool(self._pending)
        return self._give(self._settled())

    def flush(self) -> str:
        self._pending = self._pending.rstrip()
        return self._give(len(self._pending))

    def _settled(self) -> int:
        """How much of the pending text cannot change any more."""
        text = self._pending
        end = len(text.rstrip())
        for size in range(min(len(TRAINING_TIME) - 1, end), 0, -1):
            if TRAINING_TIME.startswith(text[end - size : end]) and end == len(text):
                end -= size
                break
        while end and text[end - 1] in _MARKS:
            end -= 1
        return end

    def _give(self, end: int) -> str:
        if not end:
            return ""
        settled, following = self._pending[:end], self._pending[end : end + 1]
        self._pending = self._pending[end:]
        settled = settled.replace(TRAINING_TIME, TRAINING_TIME_ANSWER)
        cleaned = _widen(self._before + settled + following)
        cleaned = cleaned[len(self._before) : len(cleaned) - len(following)]
        self._before = cleaned[-1:] or self._before
        return cleaned
