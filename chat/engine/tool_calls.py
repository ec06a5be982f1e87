"""Calls of functions in an answer, as models write them:

    <tool_call>{"name": "f", "arguments": {...}}</tool_call>      Hermes, Qwen, SmolLM3
    <tool_call><function=f><parameter=x>1</parameter></function></tool_call>      Qwen3-Coder
    <tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>          GLM-4.5
    {"name": "f", "parameters": {...}}; {...}                     Llama 3
    <|python_tag|>{"name": "f", "parameters": {...}}              the same
    [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]          Mistral
    [TOOL_CALLS]f[ARGS]{...}                                      Mistral since 2025

Control tokens are left out of answers, so the last four may begin without their mark; then the
whole answer begins so, and the function is one of those that were offered. No torch, no Django.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from chat.engine.tools import TOOL_CALL

END = "</tool_call>"
MARKS = (TOOL_CALL, "[TOOL_CALLS]", "<|python_tag|>")
LONGEST_HEAD = 200  # characters before it is clear that an answer of JSON is no call
_STRING = r'"((?:[^"\\]|\\.)*)"'
_HEAD = re.compile(
    r'[\s\[]*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?(?:"id"\s*:\s*"[^"]*"\s*,\s*)?'
    rf'"name"\s*:\s*{_STRING}\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)'
)
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[ARGS\])?\s*(?=\{)")
_XML = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_XML_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_KEYED = re.compile(r"\s*([\w.-]+)\s*((?:<arg_key>.*?</arg_value>\s*)*)</tool_call>", re.DOTALL)
_KEYED_PARAMETER = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """Of an answer: `text`, or of its call number `index` the name (first, alone) or more of the
    arguments, which are the text of a JSON object.
    """

    text: str = ""
    index: int = -1
    name: str = ""
    arguments: str = ""


class ToolCalls:
    """Takes an answer apart as it comes: feed(piece) and flush() give what is certain. An answer
    without calls comes out as it went in.

    functions: those that were offered, by name, each with the JSON schema of its parameters.
    """

    def __init__(self, functions: dict[str, dict[str, Any]]):
        self._functions = functions
        self._held = ""
        self._mark = ""  # before the calls that are being read; "": the answer began with them
        self._object = _JsonEnd()
        self._step = self._begin
        self.count = 0  # calls found

    def feed(self, piece: str, final: bool = False) -> list[Piece]:
        self._held += piece
        found: list[Piece] = []
        while (told := self._step(final)) is not None:
            found += told
        return found

    def flush(self) -> list[Piece]:
        return self.feed("", final=True)

    # -- states: each takes from what is held, and says None when it needs more

    def _begin(self, final: bool) -> list[Piece] | None:
        text = self._held.lstrip()
        if not final and (not text or _may_become(text, MARKS)):
            return None
        named = [name + more for name in self._functions for more in ("{", "[ARGS]{")]
        if (text[:1] in ("{", "[") and not text.startswith(MARKS)) or text.startswith(tuple(named)):
            self._step = self._call
        elif not final and _may_become(text, named):
            return None
        else:
            self._step = self._text
        return []

    def _text(self, final: bool) -> list[Piece] | None:
        marks = [(at, mark) for mark in MARKS if (at := self._held.find(mark)) >= 0]
        if marks:
            at, self._mark = min(marks)
            text, self._held = self._held[:at].rstrip(), self._held[at + len(self._mark) :]
            self._step = self._call
            return [Piece(text)] if text else []
        sure = len(self._held)
        if not final:  # a mark, or the blanks before one, may be on their way
            longest = max(map(len, MARKS)) - 1
            for size in range(min(longest, sure), 0, -1):
                if _may_become(self._held[-size:], MARKS):
                    sure -= size
                    break
            sure = len(self._held[:sure].rstrip())
        text, self._held = self._held[:sure], self._held[sure:]
        return [Piece(text)] if text else None

    def _call(self, final: bool) -> list[Piece] | None:
        head = _HEAD.match(self._held)
        if head is not None and self._known(name := json.loads(f'"{head[1]}"', strict=False)):
            return self._opened(name, head.end())
        head = _NAMED.match(self._held)
        if head is not None and head[1] in self._functions:
            return self._opened(head[1], head.end())
        if self._mark == TOOL_CALL:
            for whole, parameter in ((_XML, _XML_PARAMETER), (_KEYED, _KEYED_PARAMETER)):
                found = whole.match(self._held)
                if found is not None:
                    self._held = self._held[found.end() :]
                    self._step = self._after
                    given = self._typed(found[1].strip(), parameter.findall(found[2]))
                    return self._whole(found[1].strip(), json.dumps(given, ensure_ascii=False))
        body = self._held.lstrip()
        end = _JsonEnd().find(body) if body[:1] in ("{", "[") else -1
        if end > 0:
            calls = [(name, given) for name, given in _calls_in(body[:end]) if self._known(name)]
            if calls:
                self._held, self._step = body[end:], self._after
                return [piece for call in calls for piece in self._whole(*call)]
            return self._given_back()
        endless = not self._mark and len(body) > LONGEST_HEAD
        return self._given_back() if final or endless or END in self._held else None

    def _arguments(self, final: bool) -> list[Piece] | None:
        if not self._held:
            return None
        end = self._object.find(self._held)
        if end > 0:
            self._step = self._after
        else:
            end = len(self._held)
        given, self._held = self._held[:end], self._held[end:]
        return [Piece(index=self.count - 1, arguments=given)]

    def _after(self, final: bool) -> list[Piece] | None:
        self._held = self._held.lstrip("}],; \t\r\n")
        if self._held.startswith(END):
            self._held = self._held[len(END) :]
        elif self._held.startswith("{"):
            self._step = self._call
        elif not self._held or (not final and _may_become(self._held, (END, *MARKS))):
            return None
        else:
            self._step = self._text
        return []

    # -- what a call is told as

    def _known(self, name: str) -> bool:
        return bool(self._mark) or name in self._functions

    def _opened(self, name: str, end: int) -> list[Piece]:
        self._held, self._object, self._step = self._held[end:], _JsonEnd(), self._arguments
        self.count += 1
        return [Piece(index=self.count - 1, name=name)]

    def _whole(self, name: str, arguments: str) -> list[Piece]:
        self.count += 1
        index = self.count - 1
        return [Piece(index=index, name=name), Piece(index=index, arguments=arguments)]

    def _given_back(self) -> list[Piece]:
        text, self._held, self._mark = self._mark + self._held, "", ""
        self._step = self._text
        return [Piece(text)] if text else []

    def _typed(self, name: str, given: list[tuple[str, str]]) -> dict[str, Any]:
        """Parameters that are written as text, as what the function's schema says they are."""
        properties = self._functions.get(name, {}).get("properties") or {}
        found = {}
        for key, text in given:
            key = key.strip()
            wanted = properties.get(key)
            found[key] = text
            if not isinstance(wanted, dict) or wanted.get("type") != "string":
                try:
                    found[key] = json.loads(text)
                except ValueError:
                    continue
        return found


class _JsonEnd:
    """Where the object or list ends that a text of JSON begins with, over several pieces."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    def find(self, piece: str) -> int:
        """How many characters of this piece still belong to it; -1: all, and it goes on."""
        for at, character in enumerate(piece):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return -1


def _may_become(text: str, wholes: Collection[str]) -> bool:
    return any(len(text) < len(whole) and whole.startswith(text) for whole in wholes)


def _calls_in(text: str) -> list[tuple[str, str]]:
    """(name, arguments) of each call in a JSON value, its fields in any order."""
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return []
    found = []
    for call in value if isinstance(value, list) else [value]:
        call = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return []
        given = call.get("arguments", call.get("parameters")) or {}
        if not isinstance(given, str):  # some write the object as a text
            given = json.dumps(given, ensure_ascii=False)
        found.append((call["name"], given))
    return found
