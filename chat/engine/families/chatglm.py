"""ChatGLM-6B: rounds in Chinese, two positions a token, a prompt that sees itself whole, answers
that are tidied up. The model itself is chat.chatglm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chat.engine.detokenizer import IncrementalDetokenizer
from chat.engine.families.family import Family
from chat.engine.positions import PositionPlan
from chat.engine.prompts import IGNORED, Messages, Prompter, checked
from chat.engine.request import RequestRefused

if TYPE_CHECKING:
    import torch


class ChatGLM(Family):
    name = "chatglm"
    shifts_positions = False
    bidirectional_prompt = True
    can_quantize = True
    presets_key = "chatglm-6b-train.sh"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """ChatGLM2 and 3 carry the same model_type over another architecture."""
        return (
            config.get("model_type") == "chatglm"
            and "ffn_hidden_size" not in config
            and "inner_hidden_size" in config
        )

    def prompter(self, tokenizer: Any, config: Any, generation_config: Any = None) -> Prompter:
        return ChatGLMPrompter(tokenizer, config)

    def positions(self, config: Any) -> ChatGLMPositions:
        return ChatGLMPositions(config)

    def register(self) -> None:
        import chat.chatglm  # noqa: F401  registers its Auto classes

    def tokenizer_fault(self, tokenizer: Any, config: Any) -> str:
        # Without its tokenizer_config.json a published folder's ids would all be 20,000 too high.
        if len(tokenizer) <= config.vocab_size:
            return ""
        return (
            f"the tokenizer has ids up to {len(tokenizer) - 1}, the model's vocabulary is "
            f"{config.vocab_size}: is its tokenizer_config.json missing?"
        )


class ChatGLMPositions:
    """Two positions per token: place in the prompt, and place in the answer
    (docs/chatglm.md#4-masks-and-positions). The prompt sees itself whole.

    A position is a pair (prompt position, block position).
    """

    padding = (0, 0)

    def __init__(self, config: Any):
        self._sop, self._marks = config.bos_token_id, (config.gmask_token_id, config.mask_token_id)

    def plan(self, prompt: Sequence[int], prefix: int) -> PositionPlan:
        mark = next((mark for mark in self._marks if mark in prompt), None)
        if mark is None or self._sop not in prompt:
            raise RequestRefused(
                "invalid_value",
                "a ChatGLM prompt holds [gMASK] or [MASK], and <sop>",
                param="prompt_ids",
            )
        return PositionPlan(
            prefix=prefix, context=prompt.index(self._sop), mask_position=prompt.index(mark)
        )

    @staticmethod
    def _position(plan: PositionPlan, index: int) -> tuple[int, int]:
        if index < plan.context:
            return index, 0
        return plan.mask_position, index - plan.context + 1

    def prefill(self, plan: PositionPlan, start: int, count: int) -> list[tuple[int, int]]:
        return [self._position(plan, index) for index in range(start, start + count)]

    def decode(
        self, plans: Sequence[PositionPlan], indices: Sequence[int]
    ) -> list[tuple[int, int]]:
        return [self._position(plan, index) for plan, index in zip(plans, indices, strict=True)]

    @staticmethod
    def shape(flat: torch.Tensor, rows: int) -> torch.Tensor:
        """[rows * queries, 2] -> [rows, 2, queries]."""
        return flat.view(rows, -1, 2).transpose(1, 2)


class ChatGLMPrompter(Prompter):
    """ChatGLM-6B: rounds written out in Chinese, then [gMASK] and <sop>
    (docs/chatglm.md#7-chat-format).

    The original has no system role; a system message goes as a first line before the first
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
        """The prompt as text. `always_rounds`: the round format even without history, as the
        original trains on history columns.
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

    def _plain(self, text: str) -> list[int]:
        return [*self._encode(text), self._gmask, self._sop]

    def token_bytes(self) -> list[bytes] | None:
        pieces = getattr(self.tokenizer, "pieces", None)
        if pieces is None:
            return None
        texts = (text if isinstance(text, bytes) else text.encode() for text in pieces.texts)
        return [*[b""] * pieces.offset, *texts]

    def _render(
        self,
        messages: list[dict[str, str]],
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[int]:
        return [*self._encode(self.text(messages)), self._gmask, self._sop]

    def context_ids(self, instruction: str, answered: Sequence[tuple[str, str]]) -> list[int]:
        """Plain text: control tokens would end the prompt that follows."""
        lines = [instruction, *(f"问：{prompt}\n答：{answer}" for prompt, answer in answered)]
        with self._lock:
            return self._encode("\n".join(line for line in lines if line) + "\n")

    def _fit(self, messages: list[dict[str, str]], max_length: int) -> list[int]:
        """The original cuts the end of the text, counting the two control tokens
        (docs/chatglm.md#8-training-rows).
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
        """docs/chatglm.md#8-training-rows: source cut to max_source_length - 1, target to
        max_target_length - 2; <sop> itself is a label.
        """
        with self._lock:
            source = self._encode(self.text(checked(messages), always_rounds))[
                : max_source_length - 1
            ]
            target = self._encode(response)[: max_target_length - 2]
        ids = [*source, self._gmask, self._sop, *target, self._eop]
        start = len(source) + 1
        return ids, [IGNORED] * start + ids[start:]

    def detokenizer(self) -> IncrementalDetokenizer:
        # its own tokenizer decodes incrementally itself
        stream = getattr(self.tokenizer, "stream", None)
        return stream() if stream is not None else super().detokenizer()

    def clean(self, text: str) -> str:
        return clean_chatglm(text)

    def cleaner(self) -> ChatGLMCleaner:
        return ChatGLMCleaner()


TRAINING_TIME, TRAINING_TIME_ANSWER = "[[训练时间]]", "2023年"
_MARKS = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}


def clean_chatglm(text: str) -> str:
    """The original's process_response (docs/chatglm.md#7-chat-format): strip, fill in the training
    time, full-width marks beside Chinese characters.
    """
    return _widen(text.strip().replace(TRAINING_TIME, TRAINING_TIME_ANSWER))


def _widen(text: str) -> str:
    for narrow, wide in _MARKS.items():
        text = re.sub(f"([\u4e00-\u9fff]){re.escape(narrow)}", rf"\1{wide}", text)
        text = re.sub(f"{re.escape(narrow)}([\u4e00-\u9fff])", rf"{wide}\1", text)
    return text


class ChatGLMCleaner:
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
