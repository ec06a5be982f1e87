"""What people call the columns of their rows. Pure."""

from __future__ import annotations

# What people's files are called column by column; the first that a row has is suggested.
_CONVERSATIONS = (
    "messages",
    "conversations",
    "conversation",
    "dialogue",
    "dialog",
    "dialogs",
    "turns",
)
_KNOWN = (
    ("adgen", "content", "summary", ""),
    ("prompt", "prompt", "response", "history"),
    ("alpaca", "instruction", "output", "history"),
    ("alpaca", "instruction", "response", "history"),
    ("openai", "messages", "messages", ""),
    *(("sharegpt", name, name, "") for name in _CONVERSATIONS[1:]),
    ("prompt", "prompt", "completion", "history"),
    ("question", "question", "answer", "history"),
    ("question", "question", "response", "history"),
    ("question", "query", "response", "history"),
    ("question", "query", "answer", "history"),
    ("question", "user input", "model output", "history"),
    ("question", "user", "assistant", "history"),
    *(
        ("question", asked, answered, "历史")
        for asked in ("问题", "提问", "问", "问句", "输入", "指令", "提示", "用户")
        for answered in ("回答", "答案", "回复", "答", "答句", "输出", "助手")
    ),
    ("question", "source", "target", "history"),
    ("question", "src", "tgt", "history"),
    ("question", "input", "output", "history"),
)
COLUMN_NAMES = frozenset(name for _kind, *names in _KNOWN for name in names[:2])


def suggest(names: list[str]) -> dict[str, str]:
    """{"format", "prompt_column", "response_column", "history_column"} for a row with these
    columns, whatever their case; "" where nothing fits.
    """
    spelt = {name.strip().lower().replace("_", " "): name for name in reversed(names)}
    for kind, prompt, response, history in _KNOWN:
        if prompt in spelt and response in spelt:
            return {
                "format": kind,
                "prompt_column": spelt[prompt],
                "response_column": spelt[response],
                "history_column": spelt.get(history, ""),
            }
    return {"format": "", "prompt_column": "", "response_column": "", "history_column": ""}
