"""The one place that turns text into tokens and back, for serving, training and evaluation alike.

Train and serve must see the same template, or a tuned model answers another question than it was
taught. User text never becomes a control token: a message that spells one is cut into ordinary
pieces.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from chat.engine.detokenizer import AnswerCleaner, TextStream, clean_chatglm, text_stream
from chat.engine.request import RequestRefused

ROLES = ("system", "user", "assistant")
IGNORED = -100  # label that the loss leaves out

Messages = Sequence[dict[str, str]]


def checked(messages: Messages) -> list[dict[str, str]]:
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
    return [{"role": message["role"], "content": message["content"]} for message in messages]


class Prompter(ABC):
    """Text to tokens for one checkpoint. Safe to call from several threads."""

    end_ids: frozenset[int]

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._lock = threading.RLock()

    @abstractmethod
    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokens of the whole prompt, up to where the answer begins."""

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

    def prompt_ids(self, messages: Messages, max_length: int | None = None) -> list[int]:
        """Tokens of the prompt. With `max_length` the text is shortened to fit, as in training."""
        messages = checked(messages)
        with self._lock:
            ids = self._render(messages)
            if max_length is not None and len(ids) > max_length:
                ids = self._fit(messages, max_length)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of an answer's tokens, control tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def clean(self, text: str) -> str:
        """The architecture's own post-processing of an answer."""
        return text

    def text_stream(self) -> TextStream:
        """An incremental `decode`."""
        return text_stream(self.tokenizer)

    def cleaner(self) -> AnswerCleaner | None:
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


class TemplatePrompter(Prompter):
    """The tokenizer's own chat template; without one (a plain base model) the contents are joined
    by line ends.
    """

    def __init__(self, tokenizer: Any, end_ids: frozenset[int]):
        super().__init__(tokenizer)
        self.end_ids = end_ids
        special = {str(token) for token in tokenizer.all_special_tokens}
        decoder = getattr(tokenizer, "added_tokens_decoder", {})
        special |= {str(token) for token in decoder.values() if getattr(token, "special", False)}
        self._special = (
            re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
            if special
            else None
        )
        self._end = self._end_of_answer()

    def _end_of_answer(self) -> int:
        """The token that the template puts behind an answer, if it ends generation; else the
        tokenizer's own.
        """
        if self.tokenizer.chat_template:
            probe = "\ue0a1"
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}]
            tail = self.tokenizer.apply_chat_template(messages, tokenize=False).rpartition(probe)[2]
            first = self.tokenizer.encode(tail, add_special_tokens=False)[:1]
            if first and first[0] in self.end_ids:
                return first[0]
        if self.tokenizer.eos_token_id is not None:
            return self.tokenizer.eos_token_id
        if self.end_ids:
            return min(self.end_ids)
        raise ValueError("neither tokenizer nor configuration names a token that ends an answer")

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        if not self.tokenizer.chat_template:
            text = "\n".join(message["content"] for message in messages)
            ids = self.tokenizer.encode(text, add_special_tokens=True, split_special_tokens=True)
            return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        if self._special is None or not any(
            self._special.search(message["content"]) for message in messages
        ):
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            return self.tokenizer.encode(text, add_special_tokens=False)
        # A content spells a control token: the template goes around stand-ins, and contents are
        # encoded apart from it.
        stand_ins = [f"\ue0a1{number}\ue0a2" for number in range(len(messages))]
        posed = [
            {**message, "content": mark} for message, mark in zip(messages, stand_ins, strict=True)
        ]
        text = self.tokenizer.apply_chat_template(posed, tokenize=False, add_generation_prompt=True)
        ids: list[int] = []
        for part in re.split("(\ue0a1[0-9]+\ue0a2)", text):
            if part in stand_ins:
                ids += self._encode(messages[stand_ins.index(part)]["content"])
            elif part:
                ids += self.tokenizer.encode(part, add_special_tokens=False)
        return ids

    def response_ids(self, text: str) -> list[int]:
        with self._lock:
            return [*self._encode(text), self._end]

    def training_ids(
        self, messages: Messages, response: str, max_source_length: int, max_target_length: int
    ) -> tuple[list[int], list[int]]:
        prompt = self.prompt_ids(messages, max_source_length)
        answer = [*self.response_ids(response)[:-1][: max_target_length - 1], self._end]
        return prompt + answer, [IGNORED] * len(prompt) + answer


class ChatGLMPrompter(Prompter):
    """ChatGLM-6B: rounds written out in Chinese, then [gMASK] and <sop> (SPEC 5 "Chat", 8).

    There is no system role upstream; a system message goes as a first line before the first
    question.
    """

    def __init__(self, tokenizer: Any, config: Any):
        super().__init__(tokenizer)
        self._gmask, self._sop, self._eop = (
            config.gmask_token_id,
            config.bos_token_id,
            config.eos_token_id,
        )
        self.end_ids = frozenset({self._eop})

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, messages: Messages, always_rounds: bool = False) -> str:
        """The prompt as text. `always_rounds`: the round format even without history, as upstream
        trains on history columns.
        """
        system = "\n".join(
            message["content"] for message in messages if message["role"] == "system"
        )
        rounds: list[list[str]] = []
        for message in messages:
            if message["role"] == "user":
                rounds.append([message["content"]])
            elif message["role"] == "assistant":
                if not rounds or len(rounds[-1]) == 2:
                    rounds.append([""])
                rounds[-1].append(message["content"])
        if not rounds or len(rounds[-1]) == 2:
            raise RequestRefused(
                "invalid_value", "the last message must be the user's", param="messages"
            )
        if system:
            rounds[0][0] = f"{system}\n{rounds[0][0]}"
        *history, (query,) = rounds
        if not history and not always_rounds:
            return query
        lines = []
        for number, past in enumerate(history):
            answer = past[1] if len(past) == 2 else ""
            lines.append(f"[Round {number}]\n问：{past[0]}\n答：{answer}\n")
        return "".join(lines) + f"[Round {len(history)}]\n问：{query}\n答："

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        return [*self._encode(self.text(messages)), self._gmask, self._sop]

    def _fit(self, messages: list[dict[str, str]], max_length: int) -> list[int]:
        """Upstream cuts the end of the text, counting the two control tokens (SPEC 5
        "Truncation").
        """
        return [*self._encode(self.text(messages))[: max_length - 2], self._gmask, self._sop]

    def response_ids(self, text: str) -> list[int]:
        with self._lock:
            return [*self._encode(text), self._eop]

    def training_ids(
        self,
        messages: Messages,
        response: str,
        max_source_length: int,
        max_target_length: int,
        always_rounds: bool = False,
    ) -> tuple[list[int], list[int]]:
        """SPEC 8: source cut to max_source_length - 1, target to max_target_length - 2; <sop>
        itself is a label.
        """
        with self._lock:
            source = self._encode(self.text(checked(messages), always_rounds))[
                : max_source_length - 1
            ]
            target = self._encode(response)[: max_target_length - 2]
        ids = [*source, self._gmask, self._sop, *target, self._eop]
        start = len(source) + 1
        return ids, [IGNORED] * start + ids[start:]

    def clean(self, text: str) -> str:
        return clean_chatglm(text)

    def cleaner(self) -> AnswerCleaner:
        return AnswerCleaner()


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {int(value)} if isinstance(value, int) else {int(item) for item in value}


def prompter_for(tokenizer: Any, config: Any, generation_config: Any = None) -> Prompter:
    """The prompter of a checkpoint, from its tokenizer and (generation) configuration."""
    if getattr(config, "model_type", None) == "chatglm":
        return ChatGLMPrompter(tokenizer, config)
    end_ids = _ids(getattr(generation_config, "eos_token_id", None)) | _ids(
        getattr(config, "eos_token_id", None)
    )
    return TemplatePrompter(tokenizer, frozenset(end_ids | _ids(tokenizer.eos_token_id)))
