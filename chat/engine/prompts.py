"""The one place that turns text into tokens and back, for serving, training and evaluation alike.

Train and serve must see the same template, or a tuned model answers another question than it was
taught. User text never becomes a control token: a message that spells one is cut into ordinary
pieces.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from chat.engine.detokenizer import IncrementalDetokenizer, detokenizer
from chat.engine.request import RequestRefused
from chat.engine.tools import ToolForm, in_words

ROLES = ("system", "user", "assistant", "tool")
TOOL_FIELDS = ("tool_calls", "tool_call_id", "name")
IGNORED = -100  # label that the loss leaves out
UNCUT = 1 << 30  # a length in tokens that nothing reaches

Messages = Sequence[dict[str, Any]]


def checked(messages: Messages) -> list[dict[str, Any]]:
    """The messages as plain dictionaries, or RequestRefused."""
    if not messages:
        raise RequestRefused("empty_prompt", "there are no messages", param="messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RequestRefused(
                "invalid_value", f"a message's role is one of {', '.join(ROLES)}", param="messages"
            )
        if not isinstance(message.get("content"), str):
            raise RequestRefused(
                "invalid_value", "a message's content is a string", param="messages"
            )
    if not any(message["content"].strip() for message in messages):
        raise RequestRefused("empty_prompt", "the messages hold no text", param="messages")
    return [
        {"role": message["role"], "content": message["content"]}
        | {name: message[name] for name in TOOL_FIELDS if message.get(name)}
        for message in messages
    ]


class Cleaner(Protocol):
    """Tidies a stream of text. feed(piece) + ... + flush() is `Prompter.clean` of all pieces."""

    def feed(self, piece: str) -> str: ...
    def flush(self) -> str: ...


class Prompter(ABC):
    """Text to tokens for one checkpoint. Safe to call from several threads."""

    end_ids: frozenset[int]

    tool_form: ToolForm | None = None  # how calls of functions are written; None: not at all

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._lock = threading.RLock()

    @abstractmethod
    def _render(
        self,
        messages: list[dict[str, Any]],
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[int]:
        """Tokens of the whole prompt, up to where the answer begins. thinking: whether the model
        shall think first, where its template leaves that open. tools, and turns that call them:
        only where there is a `tool_form`.
        """

    def opening(self, prompt: Sequence[int]) -> str:
        """What the prompt has begun of the answer and its reader must see."""
        return ""

    @abstractmethod
    def response_ids(self, text: str) -> list[int]:
        """Tokens of an answer; the last one ends it."""

    @abstractmethod
    def training_ids(
        self, messages: Messages, response: str, max_source_length: int, max_target_length: int
    ) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of one example, equally long, not padded; labels are IGNORED before
        the answer.
        """

    def training_lengths(self, examples: Sequence[tuple[Messages, str]]) -> list[tuple[int, int]]:
        """(tokens of the prompt, of the answer) that `training_ids` makes of each example uncut,
        all that the template and the end of the answer add with them.
        """
        found = []
        for messages, response in examples:
            ids, labels = self.training_ids(messages, response, UNCUT, UNCUT)
            prompt = labels.count(IGNORED)
            found.append((prompt, len(ids) - prompt))
        return found

    def context_ids(self, instruction: str, answered: Sequence[tuple[str, str]]) -> list[int]:
        """Tokens of a text that may stand before any prompt: an instruction and answered examples
        (prompt, response) of the task, as whole turns.
        """
        first, *others = answered or [("", "")]
        turns = [(f"{instruction}\n\n{first[0]}".strip(), first[1]), *others]
        ids: list[int] = []
        with self._lock:
            for prompt, response in turns:
                ids += self._render(checked([{"role": "user", "content": prompt}]))
                ids += self.response_ids(response) if response else []
        return ids

    def prompt_ids(
        self,
        messages: Messages,
        max_length: int | None = None,
        begun: str = "",
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] = (),
        must_call: Sequence[str] = (),
    ) -> list[int]:
        """Tokens of the prompt. With `max_length` the text is shortened to fit, as in training.
        begun: of the answer, what is there already. tools, must_call: as a Request has them.
        """
        messages = checked(messages)
        if self.tool_form is None:
            if tools:
                message = "the checkpoint's chat template has no place for tools"
                raise RequestRefused("unsupported_parameter", message, param="tools")
            messages = in_words(messages)
        elif must_call:
            begun = begun or self.tool_form.opening
        with self._lock:
            ids = self._render(messages, thinking, tools)
            if max_length is not None and len(ids) > max_length:
                ids = self._fit(messages, max_length)
            if begun:
                ids += self.response_ids(begun)[:-1]
        return ids

    def answer_schema(
        self, tools: Sequence[dict[str, Any]], must_call: Sequence[str], schema: str | None
    ) -> str | None:
        """The JSON schema of an answer of which `schema` is asked and that may, or must, call."""
        if self.tool_form is None or not tools:
            return schema
        return self.tool_form.schema(tools, must_call, schema)

    def plain_ids(self, text: str) -> list[int]:
        """Tokens of a text that is to be gone on with, no chat template around it."""
        with self._lock:
            return self._plain(text)

    @abstractmethod
    def _plain(self, text: str) -> list[int]: ...

    def token_bytes(self) -> list[bytes] | None:
        """What each id writes, nothing for control tokens; None: the tokenizer's own backend
        knows.
        """
        return None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of an answer's tokens, control tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def clean(self, text: str) -> str:
        """The architecture's own post-processing of an answer."""
        return text

    def detokenizer(self) -> IncrementalDetokenizer:
        """An incremental `decode`."""
        return detokenizer(self.tokenizer)

    def cleaner(self) -> Cleaner | None:
        """An incremental `clean`; None where `clean` is the identity."""
        return None

    def token_text(self, token_id: int) -> str:
        """How a token is spelled in logprobs."""
        return self.tokenizer.decode([token_id])

    def _encode(self, text: str) -> list[int]:
        """Plain text to tokens, no control tokens from it nor around it."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _fit(self, messages: list[dict[str, str]], max_length: int) -> list[int]:
        """Shorten to `max_length` tokens: oldest rounds go first, then the end of the last user
        message (never the template).
        """
        messages = [dict(message) for message in messages]
        while len(messages) > 1:
            ids = self._render(messages)
            if len(ids) <= max_length:
                return ids
            first = 1 if messages[0]["role"] == "system" and len(messages) > 2 else 0
            del messages[first]
            while len(messages) > first + 1 and messages[first]["role"] == "assistant":
                del messages[first]  # an answer without its question
        content = self._encode(messages[-1]["content"])
        ids = self._render(messages)
        keep = len(content)
        while len(ids) > max_length and keep > 1:
            keep = max(1, keep - (len(ids) - max_length))
            messages[-1]["content"] = self.tokenizer.decode(
                content[:keep], skip_special_tokens=False
            )
            ids = self._render(messages)
        return ids
