"""Text files to examples: prompt, response, history. Every row that cannot be used is named with
its line. No Django.

Understood are JSON lines, one JSON array, and CSV; rows with columns of any name (ADGEN's
content/summary, prompt/response/history, alpaca's instruction/input/output), and rows that hold a
whole conversation (OpenAI's messages, ShareGPT's conversations). Memory stays bounded by the
longest permitted line, whatever the size of the file.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from json.encoder import encode_basestring as quoted
from typing import Any

from tuning.datasets.sources import (
    CHUNK,
    UTF_8,
    UTF_8_BOM,
    DatasetRejected,
    Limits,
    Source,
    problem,
)

KEPT_PROBLEMS = 1000
# of a quoted field, which may hold line ends; Python's own limit is 128 KiB
csv.field_size_limit(Limits.max_line_bytes)
Row = tuple[int, Any]  # (1-based line where it begins, parsed value)
History = list[list[str]]


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


class Findings:
    """All problems of one upload: counted, the first 1,000 kept."""

    def __init__(self) -> None:
        self.problems: list[dict[str, Any]] = []
        self.errors = self.warnings = self.usable = 0
        self.member = ""

    def add(self, code: str, line: int | None, *, level: str = "error", **params) -> None:
        if level == "error":
            self.errors += 1
        else:
            self.warnings += 1
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(problem(code, line, level=level, member=self.member, **params))
        if not self.usable and self.errors >= KEPT_PROBLEMS:
            raise self.rejection()  # no sense in reading on

    def rejection(self) -> DatasetRejected:
        return DatasetRejected(self.problems, self.errors + self.warnings)


class BadRow(Exception):
    """This row is not an example."""

    def __init__(self, code: str, level: str = "error", **params):
        super().__init__(code)
        self.code, self.level, self.params = code, level, params


# What people's files are called column by column; the first that a row has is suggested.
_KNOWN = (
    ("adgen", "content", "summary", ""),
    ("prompt", "prompt", "response", "history"),
    ("alpaca", "instruction", "output", "history"),
    ("openai", "messages", "messages", ""),
    ("sharegpt", "conversations", "conversations", ""),
    ("prompt", "prompt", "completion", "history"),
    ("question", "question", "answer", "history"),
    ("question", "query", "response", "history"),
    ("question", "问题", "回答", "历史"),
    ("question", "input", "output", "history"),
)


def suggest(names: list[str]) -> dict[str, str]:
    """{"format", "prompt_column", "response_column", "history_column"} for a row with these
    columns; "" where nothing fits.
    """
    for kind, prompt, response, history in _KNOWN:
        if prompt in names and response in names:
            return {
                "format": kind,
                "prompt_column": prompt,
                "response_column": response,
                "history_column": history if history in names else "",
            }
    return {"format": "", "prompt_column": "", "response_column": "", "history_column": ""}


def first_row(source: Source, limits: Limits) -> tuple[int, dict[str, Any]]:
    """(line, row) of the first row that has columns. Raises DatasetRejected, every line before the
    end named, if none has.
    """
    findings = Findings()
    for line, row in _rows(source, limits, findings):
        if isinstance(row, dict) and row:
            return line, row
        findings.add("not_object", line)
    findings.add("no_rows", None)
    raise findings.rejection()


def examples_of(
    source: Source, columns: Columns, limits: Limits, findings: Findings
) -> Iterator[bytes]:
    """Each usable row as one canonical line: {"prompt": ..., "response": ..., "history":
    [[question, answer], ...] if any}.
    """
    to_example = _conversation(columns) if columns.conversation else _from_columns(columns)
    for line, row in _rows(source, limits, findings):
        try:
            prompt, response, history = to_example(row)
            if not prompt.strip():
                raise BadRow("empty_prompt", "warning")
            if not response.strip():
                raise BadRow("empty_response", "warning")
            if any("\0" in part for part in (prompt, response, *chain.from_iterable(history))):
                raise BadRow("nul")
            text = f'{{"prompt": {quoted(prompt)}, "response": {quoted(response)}'
            if history:
                text += f', "history": {json.dumps(history, ensure_ascii=False)}'
            encoded = (text + "}\n").encode(UTF_8)
        except BadRow as bad:
            findings.add(bad.code, line, level=bad.level, **bad.params)
        except UnicodeEncodeError:
            findings.add("half_character", line)
        else:
            findings.usable += 1
            yield encoded


# --- rows of a file
# ---------------------------------------------------------------------------------------


def _is_csv(name: str) -> bool:
    return name.lower().endswith((".csv", ".tsv"))


def _rows(source: Source, limits: Limits, findings: Findings) -> Iterator[Row]:
    source.file.seek(0)
    if _is_csv(source.name):
        return _csv_rows(source, limits, findings)
    first = source.file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    source.file.seek(0)
    if first.startswith(b"["):
        return _array_rows(source, limits, findings)
    return _line_rows(source, limits, findings)


def _lines(source: Source, limits: Limits, findings: Findings) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line up to the limit. Both encodings keep 0x0A for line ends, so
    bytes can be cut before decoding.
    """
    limit = limits.max_line_bytes
    readline = source.file.readline
    number = 0
    while line := readline(limit + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > limit and not line.endswith(b"\n"):
            while (rest := readline(CHUNK)) and not rest.endswith(b"\n"):
                pass
            findings.add("line_too_long", number, limit=limit >> 20)
            continue
        yield number, line


def _line_rows(source: Source, limits: Limits, findings: Findings) -> Iterator[Row]:
    encoding = UTF_8 if source.encoding == UTF_8_BOM else source.encoding
    loads = json.loads
    for number, line in _lines(source, limits, findings):
        try:
            yield number, loads(line.decode(encoding))
        except UnicodeDecodeError:
            findings.add("encoding", number)
        except json.JSONDecodeError as fault:
            if not line.isspace():
                findings.add("not_json", number, position=fault.pos + 1)
        except (ValueError, RecursionError):
            # a number of thousands of digits, brackets nested thousands deep
            findings.add("not_json", number, position=1)


def _array_rows(source: Source, limits: Limits, findings: Findings) -> Iterator[Row]:
    """The elements of one JSON array, one at a time. Nothing can be read behind a syntax error, so
    the first one is the last.
    """
    decoder = codecs.getincrementaldecoder(source.encoding)()
    parse = json.JSONDecoder().raw_decode
    text, at, line, at_end = "", 0, 1, False
    expected = "["  # then "," or "]" behind each element

    def fill() -> bool:
        nonlocal text, at, at_end
        data = source.file.read(CHUNK)
        at_end = not data
        text, at = text[at:] + decoder.decode(data, final=at_end), 0
        return not at_end

    def skip_blanks() -> str:
        """The next character that is no blank, "" at the end."""
        nonlocal at, line
        while True:
            while at < len(text) and text[at] in " \t\r\n":
                line += text[at] == "\n"
                at += 1
            if at < len(text) or not fill():
                return text[at : at + 1]

    try:
        while True:
            mark = skip_blanks()
            if mark == "]" and expected != "[":
                at += 1
                if skip_blanks():
                    findings.add("not_json", line, position=1)
                return
            if not mark or mark not in expected:
                findings.add("not_json", line, position=1)
                return
            at += 1
            if skip_blanks() == "]" and expected == "[":
                expected = ","
                continue
            while True:
                try:
                    value, end = parse(text, at)
                    # a number that ends with the text may go on behind it
                    if end < len(text) or at_end:
                        break
                except json.JSONDecodeError as fault:
                    if at_end or (
                        fault.pos < len(text) - 16
                        and not fault.msg.startswith("Unterminated string")
                    ):
                        findings.add(
                            "not_json", line + text.count("\n", at, fault.pos), position=fault.colno
                        )
                        return
                except (ValueError, RecursionError):
                    findings.add("not_json", line, position=1)
                    return
                if len(text) - at > limits.max_line_bytes:
                    findings.add("line_too_long", line, limit=limits.max_line_bytes >> 20)
                    return
                fill()
            yield line, value
            line += text.count("\n", at, end)
            at, expected = end, ","
    except UnicodeDecodeError:
        findings.add("encoding", line)


def _delimiter(header: str) -> str:
    return max(",\t;", key=header.count)


def _csv_rows(source: Source, limits: Limits, findings: Findings) -> Iterator[Row]:
    encoding = UTF_8 if source.encoding == UTF_8_BOM else source.encoding
    broken: list[int] = []
    last = 0  # the line that was read last

    def texts() -> Iterator[str]:
        nonlocal last
        for last, line in _lines(source, limits, findings):
            try:
                yield line.decode(encoding)
            except UnicodeDecodeError:
                broken.append(last)
                yield line.decode(encoding, errors="replace")

    lines = texts()
    header = next((line for line in lines if line.strip()), "")
    try:
        names = next(csv.reader([header], delimiter=_delimiter(header)), [])
    except csv.Error:
        findings.add("not_csv", last)
        return
    reader = csv.reader(lines, delimiter=_delimiter(header))
    while True:
        start = last + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as fault:
            if "field limit" in str(fault):
                findings.add("line_too_long", start, limit=limits.max_line_bytes >> 20)
            else:
                findings.add("not_csv", start)
            continue
        if broken:
            for number in broken:
                findings.add("encoding", number)
            broken.clear()
        elif fields:
            yield start, dict(zip(names, fields, strict=False))


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
    if value is None:
        return ""
    raise BadRow("not_text", column=name)


def _from_columns(columns: Columns) -> Callable[[Any], tuple[str, str, History]]:
    prompt_column, response_column, history_column = (
        columns.prompt,
        columns.response,
        columns.history,
    )
    joins_input = prompt_column == "instruction" and response_column != "input"  # alpaca

    def to_example(row: Any) -> tuple[str, str, History]:
        if type(row) is not dict:
            raise BadRow("not_object")
        prompt, response = _text(row, prompt_column), _text(row, response_column)
        if joins_input and row.get("input"):
            prompt = f"{prompt}\n{_text(row, 'input')}"
        return prompt, response, _history(row, history_column) if history_column else []

    return to_example


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


_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def _conversation(columns: Columns) -> Callable[[Any], tuple[str, str, History]]:
    """The last answer is the response, its question the prompt, the rounds before it the history.

    A system text stands before the first question, on a line of its own; a question without an
    answer at the end is left out.
    """
    name = columns.prompt

    def to_example(row: Any) -> tuple[str, str, History]:
        if type(row) is not dict:
            raise BadRow("not_object")
        if name not in row:
            raise BadRow("missing_column", column=name, columns=", ".join(map(str, row))[:300])
        turns = row[name]
        if not isinstance(turns, list):
            raise BadRow("bad_conversation", column=name, turn=1)
        rounds: History = []
        system = ""
        for number, turn in enumerate(turns, 1):
            role = text = None
            if isinstance(turn, dict):
                role = _ROLES.get(str(turn.get("role", turn.get("from"))))
                text = turn.get("content", turn.get("value"))
            if role is None or not isinstance(text, str):
                raise BadRow("bad_conversation", column=name, turn=number)
            waiting = bool(rounds) and len(rounds[-1]) == 1
            if role == "system" and number == 1:
                system = text
            elif role == "user" and not waiting:
                rounds.append([f"{system}\n{text}" if system and not rounds else text])
            elif role == "assistant" and waiting:
                rounds[-1].append(text)
            else:
                raise BadRow("bad_conversation", column=name, turn=number)
        if rounds and len(rounds[-1]) == 1:
            rounds.pop()
        if not rounds:
            raise BadRow("empty_response", "warning")
        *history, (prompt, response) = rounds
        return prompt, response, history

    return to_example
