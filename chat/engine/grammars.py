"""Answers that are JSON of a given shape: which tokens may come next, by llguidance.

A schema is compiled once for each request, on the thread that submits it; the sampler asks for a
mask before every token. Where the whole value has been written only the end may follow.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from chat.engine.loading import Loaded
from chat.engine.request import RequestRefused

# A blank at most between two tokens of JSON: a small model may write line ends until it is cut off.
_LAYOUT: Any = {"whitespace_pattern": " ?"}


class Grammar:
    """What one answer may still say."""

    def __init__(self, matcher: Any, vocabulary: int, ends: list[int]):
        self._matcher, self._vocabulary, self._ends = matcher, vocabulary, ends
        self._shifts = torch.arange(32, dtype=torch.int32)

    def allowed(self) -> torch.Tensor:
        """bool [vocabulary], on the CPU. ValueError when the matcher gave up."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise ValueError(f"the JSON schema is too much: {self._matcher.get_error()}")
        words = torch.frombuffer(bytearray(mask), dtype=torch.int32)
        bits = (words[:, None] >> self._shifts & 1).flatten().bool()
        bits = torch.nn.functional.pad(bits, (0, self._vocabulary - len(bits)))  # or cut
        if not self._matcher.is_accepting():
            bits[self._ends] = False  # also where the tokenizer takes an end for ordinary text
        return bits

    def take(self, token: int) -> None:
        """`token` has been chosen among the allowed ones."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class Grammars:
    """Compiles for one checkpoint; its vocabulary is read when it is first needed."""

    def __init__(self, loaded: Loaded):
        self._loaded, self._lock = loaded, threading.Lock()
        self._tokenizer: Any = None

    def compile(self, schema: str, param: str = "response_format") -> Grammar:
        """RequestRefused, naming `param`, for what is no JSON schema, or one that llguidance does
        not know.
        """
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=_LAYOUT)
            matcher = LLMatcher(self._vocabulary(), grammar, log_level=0)
            problem = matcher.get_error() if matcher.is_error() else ""
        except ValueError as error:
            problem = str(error)
        if problem:
            reason = problem.strip().splitlines()[0]
            raise RequestRefused(
                "invalid_value", f"the JSON schema cannot be used: {reason}", param
            )
        return Grammar(matcher, self._loaded.vocabulary, sorted(self._loaded.prompter.end_ids))

    def _vocabulary(self) -> Any:
        """llguidance's view of the tokenizer. ValueError: the tokenizer's kind is unknown."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._read()
            return self._tokenizer

    def _read(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper
        from llguidance.hf import from_tokenizer

        prompter, size = self._loaded.prompter, self._loaded.vocabulary
        ends = sorted(prompter.end_ids)
        written = prompter.token_bytes()
        if written is None:
            if not isinstance(prompter.tokenizer, PreTrainedTokenizerFast):
                raise ValueError("this checkpoint's tokenizer does not say what its tokens write")
            return from_tokenizer(prompter.tokenizer, n_vocab=size, eos_token=ends)
        tokens = (written + [b""] * size)[:size]
        return LLTokenizer(TokenizerWrapper(_Bytes(tokens, ends[0])), eos_token=ends)


class _Bytes:
    """A vocabulary as TokenizerWrapper takes one."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], end: int):
        self.eos_token_id = end
        self.tokens = [token or f"<[{i}]>".encode() for i, token in enumerate(tokens)]
        self.special_token_ids = [i for i, token in enumerate(tokens) if not token]

    def __call__(self, text: bytes) -> list[int]:
        """Only ever asked about forced text, for which byte by byte is right as well."""
        return [self.tokens.index(bytes([byte])) for byte in text]
