"""Text files to rows, whatever way they were written. Every row that cannot be read is named with
its line. No Django.

Read are JSON lines; JSON arrays and objects one after another, however they are broken into lines;
an object around the rows ({"data": [...]}); tables as pandas writes them (by columns, by index,
"split"); CSV. Memory stays bounded by the longest permitted line, whatever the size of the file,
except for a table by columns, which stands in memory as a whole and has a limit of its own.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tuning.datasets.columns import COLUMN_NAMES as _COLUMN_NAMES
from tuning.datasets.encodings import CHUNK, GB18030_BOM, UTF_8, UTF_8_BOM
from tuning.datasets.findings import Findings
from tuning.datasets.sources import Limits, Source

# of a quoted field, which may hold line ends; Python's own limit is 128 KiB
csv.field_size_limit(Limits.max_line_bytes)
Row = tuple[int, Any]  # (1-based line where it begins, parsed value)
_TABLE_LINES = 8  # a table by columns may be as long as so many of the longest lines


def rows_of(source: Source, limits: Limits, findings: Findings) -> Iterator[Row]:
    if _is_table(source):
        return _csv_rows(source, limits, findings)
    if _one_row_a_line(source, limits):
        return _line_rows(source, limits, findings)
    return _value_rows(source, limits, findings)


def _is_table(source: Source) -> bool:
    """CSV, by what the file holds; its name decides where that could be either."""
    source.file.seek(0)
    head = source.file.read(CHUNK).removeprefix(codecs.BOM_UTF8).removeprefix(GB18030_BOM)
    source.file.seek(0)
    text = head.decode(_line_encoding(source), errors="replace").lstrip("\ufeff \t\r\n")
    first = re.split(r"[\r\n]", text, maxsplit=1)[0]
    named = source.name.lower().endswith((".csv", ".tsv"))
    if named:
        return not re.match(r'\{\s*"|\[\s*[{\[]', text)
    if not text or text[0] in "{[\"'/#“‘":
        return False
    names = [name.strip().lower() for name in first.split(_delimiter(first))]
    return len(names) > 1 and any(name in _COLUMN_NAMES for name in names)


def _lines(source: Source, limits: Limits, findings: Findings) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line up to the limit. Both encodings keep 0x0A for line ends, so
    bytes can be cut before decoding.
    """
    limit = limits.max_line_bytes
    readline = source.file.readline
    number = 0
    while line := readline(limit + 1):
        number += 1
        if number > limits.max_lines:
            findings.add("too_many_lines", number, limit=limits.max_lines)
            return
        if number == 1:
            line = line.removeprefix(GB18030_BOM)
        line = line.removeprefix(codecs.BOM_UTF8)  # also where files were put one behind another
        if len(line) > limit and not line.endswith(b"\n"):
            while (rest := readline(CHUNK)) and not rest.endswith(b"\n"):
                pass
            findings.add("line_too_long", number, limit=limit >> 20)
            continue
        yield number, line


# --- JSON lines
# ---------------------------------------------------------------------------------------


def _line_encoding(source: Source) -> str:
    return UTF_8 if source.encoding == UTF_8_BOM else source.encoding


def _one_row_a_line(source: Source, limits: Limits) -> bool:
    """Are these JSON lines? Then a broken line costs itself alone. Else it is JSON that goes over
    lines as it likes. Leaves the file at its start.
    """
    lines = (line for _number, line in _lines(source, limits, Findings()) if line.strip())
    try:
        source.file.seek(0)
        head = source.file.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
        if head.startswith(b"["):
            return False
        if _WRAPPER.match(head.decode(_line_encoding(source), errors="replace")) and not (
            head.partition(b"\n")[2].strip()
        ):
            return False
        source.file.seek(0)
        first = next(lines, b"").strip()
        text = first.decode(_line_encoding(source), errors="replace")
        try:
            json.loads(text)
            return next(lines, None) is not None
        except json.JSONDecodeError as fault:
            goes_on = first.startswith(b"{") and first.endswith((b"{", b"[", b","))
            if fault.msg == "Extra data":  # also the line ends of an old Mac
                return "\r{" not in text or next(lines, None) is not None
            return not goes_on and not _COMMENT.match(text)
        except (ValueError, RecursionError):
            return True
    finally:
        source.file.seek(0)


def _line_rows(source: Source, limits: Limits, findings: Findings) -> Iterator[Row]:
    encoding = _line_encoding(source)
    loads = json.loads
    for number, line in _lines(source, limits, findings):
        if line.isspace():  # costs a million of them a tenth of what the parser would
            continue
        try:
            yield number, loads(line.decode(encoding))
        except UnicodeDecodeError:
            findings.add("encoding", number)
        except json.JSONDecodeError as fault:
            code = _fault_code(fault.doc, fault.pos) or "not_json"
            findings.add(code, number, position=fault.pos + 1)
        except (ValueError, RecursionError):
            # a number of thousands of digits, brackets nested thousands deep
            findings.add("not_json", number, position=1)


def _fault_code(text: str, at: int) -> str:
    """What people do wrong in JSON written by hand or by print(); "" for anything else."""
    mark, rest = text[at : at + 1], text[at : at + 64]
    if _COMMENT.match(rest):
        return "json_comment"
    if re.match(r"(None|True|False)\b", rest):
        return "python_words"
    if mark in ("}", "]") and text[max(0, at - 64) : at].rstrip().endswith(","):
        return "stray_comma"
    if mark == "," and rest[1:].lstrip()[:1] in ("", "}", "]"):
        return "stray_comma"
    return "wrong_quotes" if mark and mark in "'‘’“”" else ""


# --- JSON that goes over lines
# ---------------------------------------------------------------------------------------

_STRING = r'"(?:[^"\\]|\\.)*+"'
# {"version": 1, "data": [{ — an object whose first list holds objects
_WRAPPER = re.compile(
    rf"\{{\s*+(?:{_STRING}\s*+:\s*+(?:{_STRING}|-?[0-9][0-9.eE+-]*+|true|false|null)\s*+,\s*+)*+"
    rf"(?P<name>{_STRING})\s*+:\s*+\[\s*+(?=\{{)",
    re.DOTALL,
)


_COMMENT = re.compile(r"//|/\*|#")


class _Broken(Exception):
    """Nothing behind this place can be read."""

    def __init__(self, code: str, line: int, **params):
        super().__init__(code)
        self.code, self.line, self.params = code, line, params


class _Text:
    """A file's text, a piece at a time. `line`: where reading stands."""

    _parse = json.JSONDecoder().raw_decode

    def __init__(self, source: Source):
        self._file = source.file
        self._decoder = codecs.getincrementaldecoder(source.encoding)()
        self._text, self._at, self._before, self._at_end = "", 0, 0, False
        self.line = 1

    def _fill(self) -> bool:
        """Reads on, as much again as is being looked at, so that a long value costs two looks."""
        if self._at_end:
            return False
        done = self._text[: self._at]  # _before: characters of this line that were dropped
        self._before = len(done) - done.rfind("\n") - 1 + self._before * ("\n" not in done)
        data = self._file.read(max(CHUNK, len(self._text) - self._at))
        self._at_end = not data
        text = self._decoder.decode(data, final=self._at_end)
        self._text, self._at = self._text[self._at :] + text, 0
        return not self._at_end

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def broken(self, at: int | None = None) -> _Broken:
        at = self._at if at is None else at
        begin = self._text.rfind("\n", 0, at)
        position = at - begin if begin >= 0 else at + 1 + self._before
        line = self.line + self._text.count("\n", self._at, at)
        if self._at_end and not self._text[at:].strip():
            return _Broken("unfinished", line)
        code = _fault_code(self._text, at) or "broken_json"
        return _Broken(code, line, position=position)

    def peek(self) -> str:
        """The next character that is no blank, "" at the end."""
        while True:
            end = self._at
            while end < len(self._text) and self._text[end] in " \t\r\n":
                end += 1
            self._advance(end)
            if end < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def take(self, expected: str) -> str:
        """The next character, one of those expected."""
        mark = self.peek()
        if not mark or mark not in expected:
            raise self.broken()
        self._at += 1
        return mark

    def closes(self, comma_seen: bool) -> bool:
        """Does a list end here? A comma before its end is named."""
        if self.peek() != "]":
            return False
        if comma_seen:
            raise self.broken()
        self._at += 1
        return True

    def wrapper(self, longest: int) -> tuple[str, int] | None:
        """(name of the list, characters up to its first object) if the object that begins here is
        there for a list of rows. A conversation's turns are no rows.
        """
        found = _WRAPPER.match(self._text, self._at)
        if not found:
            return None
        name, offset = json.loads(found["name"], strict=False), found.end() - self._at
        try:
            first, _end = self._value(offset, longest)
        except _Broken:
            return name, offset
        turn = isinstance(first, dict) and (first.keys() & {"role", "from", "speaker"} or (
            name in ("conversation", "conversations") and "human" in first
        ))  # fmt: skip
        return None if turn else (name, offset)

    def skip(self, count: int) -> None:
        self._advance(self._at + count)

    def _value(self, offset: int, longest: int) -> tuple[Any, int]:
        """(value, its end) of what begins `offset` characters from here, without going there."""
        while True:
            begin = self._at + offset
            try:
                value, end = self._parse(self._text, begin)
                # a number that ends with the text may go on behind it
                if end < len(self._text) or self._at_end:
                    return value, end
            except json.JSONDecodeError as fault:
                open_string = fault.msg.startswith("Unterminated")
                if self._at_end or not (open_string or fault.pos >= len(self._text) - 16):
                    at = len(self._text) if open_string else fault.pos
                    raise self.broken(at) from None
            except (ValueError, RecursionError):
                raise self.broken() from None
            if len(self._text) - begin > longest:
                raise _Broken("line_too_long", self.line, limit=longest >> 20)
            self._fill()

    def value(self, longest: int) -> Row:
        self.peek()
        line = self.line
        value, end = self._value(0, longest)
        self._advance(end)
        return line, value


def _value_rows(source: Source, limits: Limits, findings: Findings) -> Iterator[Row]:
    text = _Text(source)
    longest = limits.max_line_bytes
    try:
        while mark := text.peek():
            if mark == "[":
                yield from _array(text, longest)
            elif mark != "{":
                raise text.broken()
            elif (wrapper := text.wrapper(longest)) is not None:
                name, offset = wrapper
                text.skip(offset)
                yield from _elements(text, longest)
                _end_of_wrapper(text, name, longest)
            else:
                line, value = text.value(_TABLE_LINES * longest)
                table = _table(value)
                yield from [(line, value)] if table is None else ((line, row) for row in table)
    except _Broken as broken:
        findings.add(broken.code, broken.line, **broken.params)
    except UnicodeDecodeError:
        findings.add("encoding", text.line)


def _array(text: _Text, longest: int) -> Iterator[Row]:
    """The elements, one at a time; a list of plain values is one row, which has no names."""
    line = text.line
    text.take("[")
    if text.closes(comma_seen=False):
        return
    if text.peek() in "{[":
        yield from _elements(text, longest)
        return
    values = []
    while True:
        values.append(text.value(longest)[1])
        if text.take(",]") == "]":
            break
        text.closes(comma_seen=True)
        if len(values) > 1000:  # of what use is a row of so many cells
            raise _Broken("no_names", line)
    yield line, values


def _elements(text: _Text, longest: int) -> Iterator[Row]:
    """Up to and with the closing bracket."""
    while True:
        yield text.value(longest)
        if text.take(",]") == "]":
            return
        text.closes(comma_seen=True)


def _end_of_wrapper(text: _Text, name: str, longest: int) -> None:
    """Reads on to the end of the object around the rows. A second list in it, or anything behind
    it, is not guessed at.
    """
    while text.take(",}") == ",":
        _line, other = text.value(longest)
        text.take(":")
        if text.peek() in ("[", "{"):
            raise _Broken("two_lists", text.line, first=name[:80], second=str(other)[:80])
        text.value(longest)
    if text.peek():
        raise text.broken()


def _table(value: dict) -> list[Any] | None:
    """The rows of a table in one object, as pandas writes it; None if it is a row itself.

    {"a": [1, 2], "b": [3, 4]}; {"a": {"0": 1}, "b": {"0": 3}}; {"0": {"a": 1}, "1": {"a": 2}};
    {"columns": ["a", "b"], "data": [[1, 3], [2, 4]]}
    """
    parts = list(value.values())
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        names = [str(name) for name in value["columns"]]
        return [
            dict(zip(names, row, strict=False))
            if isinstance(row, list) and len(row) == len(names)
            else row
            for row in value["data"]
        ]
    if parts and all(isinstance(part, dict) and part for part in parts):
        if all(name.isdecimal() for name in value):
            return parts
        keys = parts[0].keys()
        if all(key.isdecimal() for key in keys) and all(part.keys() == keys for part in parts):
            return [{name: part[key] for name, part in value.items()} for key in keys]
    if parts and all(
        isinstance(part, list)
        and len(part) == len(parts[0])
        and part
        and not any(isinstance(cell, dict) for cell in part)
        for part in parts
    ):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*parts, strict=True)]
    return None


# --- CSV
# ---------------------------------------------------------------------------------------


def _delimiter(header: str) -> str:
    return max(",\t;|", key=header.count)


def _csv_rows(source: Source, limits: Limits, findings: Findings) -> Iterator[Row]:
    encoding = _line_encoding(source)
    broken: list[int] = []
    last = 0  # the line that was read last

    def texts() -> Iterator[str]:
        nonlocal last
        for last, line in _lines(source, limits, findings):
            try:
                text = line.decode(encoding)
            except UnicodeDecodeError:
                broken.append(last)
                text = line.decode(encoding, errors="replace")
            if "\r" in text.rstrip("\r\n") and '"' not in text:  # an old Mac's line ends
                for number, one in enumerate(text.splitlines(keepends=True)):
                    last += number > 0
                    yield one
            else:
                yield text

    lines = texts()
    header = next((line for line in lines if line.strip()), "")
    told = re.fullmatch(r"sep=(.)\s*", header)  # what Excel reads, and other programs write for it
    if told:
        header = next(lines, "")
    delimiter = told[1] if told else _delimiter(header)
    try:
        names = next(csv.reader([header], delimiter=delimiter, strict=True), [])
    except csv.Error as fault:
        findings.add(_csv_code(fault), last, until=last)
        return
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    twice = sorted(name for name, count in Counter(names).items() if name and count > 1)
    if twice:
        findings.add("column_twice", last, column=", ".join(twice)[:100])
        return
    # strict: a quotation mark that is never closed would else swallow all rows behind it
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start = last + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as fault:
            findings.add(_csv_code(fault), start, until=last, limit=limits.max_line_bytes >> 20)
            continue
        if broken:
            for number in broken:
                findings.add("encoding", number)
            broken.clear()
        elif len(fields) > len(names) and any(map(str.strip, fields[len(names) :])):
            findings.add("too_many_fields", start, fields=len(fields), names=len(names))
        elif fields:
            yield start, dict(zip(names, fields, strict=False))


def _csv_code(fault: csv.Error) -> str:
    told = str(fault)
    if "unexpected end" in told:
        return "unclosed_quote"
    if "expected after" in told:
        return "stray_quote"
    return "unclosed_quote" if "field limit" in told else "not_csv"
