"""ChatGLM-6B's chat format: what a conversation looks like as a prompt, and how upstream tidies an answer (SPEC 5, "Chat")."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CJK = "[\u4e00-\u9fff]"
# Half-width marks that become full-width when they touch a CJK character; applied in this order.
_MARKS = tuple(
    (re.compile(f"({_CJK}){re.escape(half)}"), re.compile(f"{re.escape(half)}({_CJK})"), full)
    for half, full in ((",", "，"), ("!", "！"), (":", "："), (";", "；"), ("?", "？"))
)


def prompt_text(query: str, history: Sequence[tuple[str, str]] = (), *, rounds: bool | None = None) -> str:
    """The prompt for `query` after `history`, (question, answer) pairs.

    rounds: whether to write the [Round n] format; None: only when there is a history, as upstream chats. Training data with
        a history column has it always (SPEC 8).
    """
    if not (bool(history) if rounds is None else rounds):
        return query
    turns = [f"[Round {turn}]\n问：{question}\n答：{answer}\n" for turn, (question, answer) in enumerate(history)]
    return "".join([*turns, f"[Round {len(history)}]\n问：{query}\n答："])


def tidy_answer(text: str) -> str:
    """An answer as upstream shows it: trimmed, the training date filled in, full-width marks beside Chinese characters."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    for after, before, full in _MARKS:
        text = before.sub(rf"{full}\1", after.sub(rf"\1{full}", text))
    return text
