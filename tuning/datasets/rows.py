"""Rows to examples: prompt, response, history. Every row that cannot be used is named with its
line. No Django.

Columns may have any name (ADGEN's content/summary, prompt/response/history, alpaca's
instruction/input/output), or one of them holds a whole conversation (OpenAI's messages, ShareGPT's
conversations, Firefly's conversation).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from json.encoder import encode_basestring as quoted
from typing import Any

from tuning.datasets.findings import Findings
from tuning.datasets.lint import Lint
from tuning.datasets.parsing import rows_of
from tuning.datasets.sources import UTF_8, Limits, Source

History = list[list[str]]
Note = Callable[..., None]  # a warning at the row that is being read: code and its parameters


@dataclass(frozen=True)
class Columns:
    """Where a row keeps its parts. `response` equal to `prompt`, or empty: that column holds the
    whole conversation.
    """

    prompt: str
    response: str = ""
    history: str = ""

    @property
    def conversation(self) -> bool:
        return self.response in ("", self.prompt)


class BadRow(Exception):
    """This row is not an example."""

    def __init__(self, code: str, level: str = "error", **params):
        super().__init__(code)
        self.code, self.level, self.params = code, level, params


def first_row(source: Source, limits: Limits) -> tuple[int, dict[str, Any]]:
    """(line, row) of the first row that has columns. Raises DatasetRejected, every kind of problem
    before the end named, if none has.
    """
    findings = Findings()
    for line, row in rows_of(source, limits, findings):
        if isinstance(row, dict) and row:
            return line, row
        findings.add(_no_object(row).code, line)
    if not findings.errors:
        findings.add("no_rows", None)
    raise findings.rejection()


def _no_object(row: Any) -> BadRow:
    return BadRow("no_names" if isinstance(row, (list, str)) else "not_object")


def examples_of(
    source: Source,
    columns: Columns,
    limits: Limits,
    findings: Findings,
    lint: Lint | None = None,
) -> Iterator[bytes]:
    """Each usable row as one canonical line: {"prompt": ..., "response": ..., "history":
    [[question, answer], ...] if any}, which `lint` sees too.
    """
    line = 0

    def note(code: str, **params) -> None:
        findings.add(code, line, level="warning", **params)

    read = _conversation(columns, note) if columns.conversation else _from_columns(columns)
    has_system = "system" not in (columns.prompt, columns.response, columns.history)
    for line, row in rows_of(source, limits, findings):
        try:
            if type(row) is not dict:
                raise _no_object(row)
            prompt, response, history = read(row)
            if not prompt.strip():
                raise BadRow("empty_prompt", "warning")
            if has_system and row.get("system"):
                # before the first question, on a line of its own: where a system turn stands
                system = _text(row, "system")
                if history:
                    history[0] = [_joined(system, history[0][0]), *history[0][1:]]
                else:
                    prompt = _joined(system, prompt)
            encoded = canonical(prompt, response, history)
        except BadRow as bad:
            findings.add(bad.code, line, level=bad.level, **bad.params)
        else:
            findings.usable += 1
            if lint is not None:
                lint.see(line, encoded, prompt, history, response)
            yield encoded


def canonical(prompt: str, response: str, history: History) -> bytes:
    """An example as its line in a split's file. Raises BadRow for what is no example."""
    if not prompt.strip():
        raise BadRow("empty_prompt", "warning")
    if not response.strip():
        raise BadRow("empty_response", "warning")
    if any("\0" in part for part in (prompt, response, *chain.from_iterable(history))):
        raise BadRow("nul")
    text = f'{{"prompt": {quoted(prompt)}, "response": {quoted(response)}'
    if history:
        text += f', "history": {json.dumps(history, ensure_ascii=False)}'
    try:
        return (text + "}\n").encode(UTF_8)
    except UnicodeEncodeError:
        raise BadRow("half_character") from None


# --- a row's parts
# ---------------------------------------------------------------------------------------


def _text(row: dict, name: str) -> str:
    try:
        value = row[name]
    except KeyError:
        raise BadRow(
            "missing_column", column=name, columns=", ".join(map(str, row))[:300]
        ) from None
    except TypeError:
        raise BadRow("not_object") from None
    if isinstance(value, str):
        return value
    if value is None or value != value:  # NaN, which pandas writes for a missing cell
        return ""
    raise BadRow("not_text", column=name)


def _joined(*texts: str) -> str:
    """Parts of a prompt, each on lines of its own; a blank one is none."""
    return "\n".join(text for text in texts if text.strip())


def _from_columns(columns: Columns) -> Callable[[dict], tuple[str, str, History]]:
    prompt_column, response_column, history_column = (
        columns.prompt,
        columns.response,
        columns.history,
    )
    # alpaca's input, Dolly's context
    joined: tuple[str, ...] = ()
    if prompt_column.lower() == "instruction":
        joined = ("input", "context")
    joined = tuple(name for name in joined if name not in (response_column, history_column))

    def read(row: dict) -> tuple[str, str, History]:
        prompt, response = _text(row, prompt_column), _text(row, response_column)
        for name in joined:
            if row.get(name):
                prompt = _joined(prompt, _text(row, name))
        return prompt, response, _history(row, history_column) if history_column else []

    return read


def _history(row: dict, name: str) -> History:
    """[[question, answer], ...]; in CSV the same as JSON text; absent or empty: none."""
    value = row.get(name)
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow("bad_history", column=name) from None
    if not value:
        return []
    if isinstance(value, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in value
    ):
        return value
    raise BadRow("bad_history", column=name)


_ROLES = dict.fromkeys(("system", "developer"), "system")
_ROLES |= dict.fromkeys(("user", "human", "prompter"), "user")
_ROLES |= dict.fromkeys(
    ("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "model", "bot", "ai", "chatbot"),
    "assistant",
)
_ROLES |= dict.fromkeys(
    ("tool", "function", "function_call", "tool_call", "observation", "ipython"), "tool"
)


def _turns(row: dict, name: str) -> Iterator[tuple[str, str]]:
    """(role, text) of each turn."""
    turns = row[name]
    if not isinstance(turns, list):
        raise BadRow("bad_conversation", column=name, turn=1)
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise BadRow("bad_conversation", column=name, turn=number)
        told = turn.get("role", turn.get("from", turn.get("speaker")))
        if told is None and {"human", "assistant"} <= turn.keys():  # Firefly: a round in one
            yield "user", _turn_text(turn["human"], name, number)
            yield "assistant", _turn_text(turn["assistant"], name, number)
            continue
        role = _ROLES.get(str(told).strip().lower())
        if role is None:
            raise BadRow("bad_conversation", column=name, turn=number)
        if role == "tool" or turn.get("tool_calls") or turn.get("function_call"):
            raise BadRow("tool_turn", "warning", turn=number)
        text = turn.get("content", turn.get("value", turn.get("text")))
        yield role, _turn_text(text, name, number)


def _turn_text(content: Any, name: str, number: int) -> str:
    if isinstance(content, list):  # OpenAI's parts
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
        raise BadRow("picture_turn", "warning", turn=number)
    if content is None or isinstance(content, str):
        return content or ""
    raise BadRow("bad_conversation", column=name, turn=number)


def _conversation(columns: Columns, note: Note) -> Callable[[dict], tuple[str, str, History]]:
    """The last answer is the response, its question the prompt, the rounds before it the history.

    A system text stands before the first question, on a line of its own. Left out with a note: an
    answer before the first question, a question without an answer at the end.
    """
    name = columns.prompt

    def read(row: dict) -> tuple[str, str, History]:
        if name not in row:
            raise BadRow("missing_column", column=name, columns=", ".join(map(str, row))[:300])
        rounds: History = []
        system, empty, leading = "", 0, False
        for number, (role, text) in enumerate(_turns(row, name), 1):
            waiting = bool(rounds) and len(rounds[-1]) == 1
            if role != "system" and not text.strip():
                empty = empty or number
            if role == "system" and number == 1:
                system = text
            elif role == "user" and not waiting:
                rounds.append([text if rounds else _joined(system, text)])
            elif role == "assistant" and waiting:
                rounds[-1].append(text)
            elif role == "assistant" and not rounds and not leading:
                leading = True
            else:
                raise BadRow("bad_conversation", column=name, turn=number)
        open_question = bool(rounds) and len(rounds[-1]) == 1
        if open_question:
            rounds.pop()
        if not rounds or not rounds[-1][1].strip():
            raise BadRow("empty_response", "warning")
        if empty:
            raise BadRow("empty_turn", "warning", turn=empty)
        if leading:
            note("leading_answer")
        if open_question:
            note("open_question")
        *history, (prompt, response) = rounds
        return prompt, response, history

    return read
