"""Every architecture of transformers that is a causal language model with plain keys and values."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chat.engine.families.family import Family
from chat.engine.families.templates import rendered
from chat.engine.positions import PositionPlan
from chat.engine.prompts import IGNORED, Messages, Prompter, checked
from chat.engine.thoughts import OPEN
from chat.engine.tools import ToolForm

if TYPE_CHECKING:
    import torch


class Causal(Family):
    name = "causal"
    shifts_positions = True
    bidirectional_prompt = False
    can_quantize = False
    presets_key = "chatglm-6b-train.sh"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") in _causal_model_types()

    def prompter(self, tokenizer: Any, config: Any, generation_config: Any = None) -> Prompter:
        end_ids = _ids(getattr(generation_config, "eos_token_id", None)) | _ids(
            getattr(config, "eos_token_id", None)
        )
        return TemplatePrompter(tokenizer, frozenset(end_ids | _ids(tokenizer.eos_token_id)))

    def positions(self, config: Any) -> CausalPositions:
        return CausalPositions()


@lru_cache
def _causal_model_types() -> frozenset[str]:
    """model_type values that the installed transformers can load as a causal language model, read
    from its source.
    """
    spec = importlib.util.find_spec("transformers")
    roots = list(spec.submodule_search_locations or []) if spec else []
    for root in roots:
        source = Path(root, "models", "auto", "modeling_auto.py")
        if not source.is_file():
            continue
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            targets = [
                target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)
            ]
            if "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES" in targets:
                entries = ast.literal_eval(node.value.args[0])  # type: ignore[attr-defined]
                return frozenset(model_type for model_type, _ in entries)
    return frozenset()


class CausalPositions:
    """One position per token, causal mask: every architecture of transformers except ChatGLM."""

    padding = 0

    def plan(self, prompt: Sequence[int], prefix: int) -> PositionPlan:
        return PositionPlan(prefix=prefix, offset=prefix)

    def prefill(self, plan: PositionPlan, start: int, count: int) -> list[int]:
        """Positions of prompt tokens start .. start+count."""
        first = plan.offset + start
        return list(range(first, first + count))

    def decode(self, plans: Sequence[PositionPlan], indices: Sequence[int]) -> list[int]:
        """Positions of the token with the given index (counted from the prompt's first) in each
        row.
        """
        return [plan.offset + index for plan, index in zip(plans, indices, strict=True)]

    @staticmethod
    def shape(flat: torch.Tensor, rows: int) -> torch.Tensor:
        """[rows * queries] as the model wants it: [rows, queries]."""
        return flat.view(rows, -1)


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
        self.tool_form = ToolForm.of(tokenizer.chat_template)

    def _end_of_answer(self) -> int:
        """The token that the template puts behind an answer, if it ends generation; else the
        tokenizer's own.
        """
        if self.tokenizer.chat_template:
            probe = "\ue0a1"
            messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}]
            try:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            except Exception:  # it will be quoted to whoever asks (templates.py)
                text = ""
            tail = text.rpartition(probe)[2] if probe in text else ""
            first = self.tokenizer.encode(tail, add_special_tokens=False)[:1]
            if first and first[0] in self.end_ids:
                return first[0]
        if self.tokenizer.eos_token_id is not None:
            return self.tokenizer.eos_token_id
        if self.end_ids:
            return min(self.end_ids)
        raise ValueError("neither tokenizer nor configuration names a token that ends an answer")

    def _plain(self, text: str) -> list[int]:
        plain: list[int] = self.tokenizer.encode(
            text, add_special_tokens=True, split_special_tokens=True
        )
        ended = plain and plain[-1] == self.tokenizer.eos_token_id
        return plain[:-1] if ended else plain

    def opening(self, prompt: Sequence[int]) -> str:
        """Templates of models that always think end in an opened thought."""
        end = self.tokenizer.decode(list(prompt[-8:]), skip_special_tokens=False)
        return f"{OPEN}\n" if end.rstrip().endswith(OPEN) else ""

    def _render(
        self,
        messages: list[dict[str, Any]],
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[int]:
        if not self.tokenizer.chat_template:
            return self._plain("\n".join(message["content"] for message in messages))
        if not self._spells_control(messages) and not self._spells_control(tools):
            text = rendered(self.tokenizer, messages, thinking, tools)
            return self.tokenizer.encode(text, add_special_tokens=False)
        # Somebody's text spells a control token: the template goes around stand-ins, and the texts
        # are encoded apart from it.
        texts: dict[str, str] = {}
        posed = [
            {
                **{k: self._posed(v, texts) for k, v in message.items() if k != "content"},
                "content": _stand_in(message["content"], texts),
            }
            for message in messages
        ]
        text = rendered(self.tokenizer, posed, thinking, self._posed(list(tools), texts))
        ids: list[int] = []
        for part in _STAND_IN.split(text):
            if part in texts:
                ids += self._encode(texts[part])
            elif part:
                ids += self.tokenizer.encode(part, add_special_tokens=False)
        return ids

    def _spells_control(self, value: Any) -> bool:
        """Does a text somewhere in a JSON value?"""
        if isinstance(value, str):
            return self._special is not None and self._special.search(value) is not None
        if isinstance(value, Mapping):
            return any(map(self._spells_control, (*value, *value.values())))
        return isinstance(value, Sequence) and any(map(self._spells_control, value))

    def _posed(self, value: Any, texts: dict[str, str]) -> Any:
        """A JSON value with each spelling of a control token, or of a stand-in, replaced."""
        if isinstance(value, str):
            for spelt in (_STAND_IN, self._special):
                if spelt is not None:
                    value = spelt.sub(lambda found: _stand_in(found[0], texts), value)
            return value
        if isinstance(value, Mapping):
            return {self._posed(k, texts): self._posed(v, texts) for k, v in value.items()}
        return [self._posed(part, texts) for part in value] if isinstance(value, list) else value

    def response_ids(self, text: str) -> list[int]:
        with self._lock:
            return [*self._encode(text), self._end]

    def training_ids(
        self, messages: Messages, response: str, max_source_length: int, max_target_length: int
    ) -> tuple[list[int], list[int]]:
        prompt = self.prompt_ids(messages, max_source_length)
        answer = [*self.response_ids(response)[:-1][: max_target_length - 1], self._end]
        return prompt + answer, [IGNORED] * len(prompt) + answer

    def training_lengths(self, examples: Sequence[tuple[Messages, str]]) -> list[tuple[int, int]]:
        """As the method it replaces, texts encoded together: half the time. One by one where that
        would be another text: no template, a control token spelled out, a slow tokenizer.
        """
        tokenizer = self.tokenizer
        if not (tokenizer.is_fast and tokenizer.chat_template):
            return super().training_lengths(examples)
        plain = [
            self._special is None
            or not any(
                self._special.search(text)
                for text in (response, *(message["content"] for message in messages))
            )
            for messages, response in examples
        ]
        together = [example for example, is_plain in zip(examples, plain, strict=True) if is_plain]
        texts = [rendered(tokenizer, checked(messages)) for messages, _response in together]
        texts += [response for _messages, response in together]
        with self._lock:
            # leaves the backend without truncation and padding, the template's tokens whole
            tokenizer.encode("", add_special_tokens=False)
            lengths = [
                len(encoding)
                for encoding in tokenizer.backend_tokenizer.encode_batch_fast(
                    texts, add_special_tokens=False
                )
            ]
        half = len(together)
        pairs = iter(zip(lengths[:half], (length + 1 for length in lengths[half:]), strict=True))
        return [
            next(pairs)
            if is_plain
            else super(TemplatePrompter, self).training_lengths([example])[0]
            for example, is_plain in zip(examples, plain, strict=True)
        ]


_STAND_IN = re.compile("(\ue0a1[0-9]+\ue0a2)")


def _stand_in(text: str, texts: dict[str, str]) -> str:
    """A text that nobody sends, kept for `text` in `texts`."""
    mark = f"\ue0a1{len(texts)}\ue0a2"
    texts[mark] = text
    return mark


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {int(value)} if isinstance(value, int) else {int(item) for item in value}
