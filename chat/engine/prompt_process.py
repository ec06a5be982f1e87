"""`python -m chat.engine.prompt_process`: renders prompts until its input ends.

One JSON object a line: {"call", "folder", ...PROMPT} in, {"call", "ids", "end_ids", "json_schema"}
or {"call", "refused": {...}} or {"call", "error"} out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from chat.engine.families import FAMILIES, family_of
from chat.engine.prompts import Prompter
from chat.engine.request import RequestRefused


def load_prompter(folder: str | Path) -> Prompter:
    """The prompter of a checkpoint folder, without its weights and without torch, of families that
    transformers knows. Raises what transformers raises on files that are missing or broken.
    """
    from transformers import AutoTokenizer

    config, generation_config = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for path in (Path(folder, "config.json"), Path(folder, "generation_config.json"))
    )
    tokenizer = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    family = family_of(config) or FAMILIES[-1]
    return family.prompter(
        tokenizer, SimpleNamespace(**config), SimpleNamespace(**generation_config)
    )


# of a call: fields of chat.engine.request.Request and of its sampling
PROMPT = ("messages", "text", "begun", "thinking", "tools", "must_call")


@lru_cache(maxsize=16)
def _prompter(folder: str) -> Prompter:
    return load_prompter(folder)


def prompt_ids(
    prompter: Prompter,
    messages: Sequence[dict[str, str]],
    text: str | None,
    begun: str = "",
    thinking: bool | None = None,
    tools: Sequence[dict[str, Any]] = (),
    must_call: Sequence[str] = (),
) -> list[int]:
    """Of messages and what there is of the answer, or of a text to be gone on with; of neither,
    none.
    """
    if text is not None:
        return prompter.plain_ids(text)
    if not messages:
        return []
    return prompter.prompt_ids(
        messages, begun=begun, thinking=thinking, tools=tools, must_call=must_call
    )


def answer(call: dict[str, Any]) -> dict[str, Any]:
    try:
        prompter = _prompter(call["folder"])
        ids = prompt_ids(prompter, *(call[name] for name in PROMPT))
        schema = prompter.answer_schema(call["tools"], call["must_call"], call["json_schema"])
        return {"ids": ids, "end_ids": sorted(prompter.end_ids), "json_schema": schema}
    except RequestRefused as refusal:
        fields = ("code", "message", "param")
        return {"refused": {name: getattr(refusal, name) for name in fields}}
    except Exception as error:  # whatever a broken folder makes a tokenizer raise
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    # transformers takes torch for not installed: tokenizers do without, a third of time and memory
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it would warn of that
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        call = json.loads(line)
        print(json.dumps({"call": call["call"], **answer(call)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
