"""Markdown that is still being written: what has ended is rendered, what is open is text.

Readers see blocks (paragraph, list, table, code) as the end will show them, from the moment when
each is complete. Only whole lines are looked at, only from the last closed block on, and a long
open block only when it has grown by a quarter, so an answer costs about as much as rendering it a
few times at its end (tests.bench.portal has the figure).
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Any

from markdown_it.token import Token

from chat.conversations import rendering
from chat.conversations.formulas import opens_unclosed
from chat.conversations.thought_blocks import CONTINUED

SMALL = 2048  # characters of an open block that is rendered anew with every line
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
# shown as rendered while they are open; a paragraph's next line may still make it a heading or a
# table
_CONTAINERS = (
    "bullet_list_open",
    "ordered_list_open",
    "table_open",
    "blockquote_open",
    "code_block",
    "thought",
)
_END_WITH_THEIR_LINE = ("heading_open", "hr", "formula")
_END_WITH_A_BLANK_LINE = ("paragraph_open", "table_open", "blockquote_open")


@dataclass
class _Span:
    """A block of the outermost level: tokens [first, after), lines [line, stop) of what was
    parsed.
    """

    first: int
    after: int
    line: int
    stop: int
    kind: str


@dataclass
class StreamedMarkdown:
    """`version` rises with every change; `epoch` when what was closed is replaced (a link that was
    defined behind its use). Text from `text_from` on is shown as it was written, inside the open
    block when `in_code`.
    """

    version: int = 0
    epoch: int = 0
    closed: list[tuple[str, int]] = field(default_factory=list)  # (HTML, where it ends)
    open_html: str = ""
    in_code: bool = False
    text_from: int = 0
    _seen: int = 0  # the complete lines up to here have been looked at
    _look_again: int = 0  # but not before there is this much
    _fence: str = ""  # of the open code block
    _environment: dict[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def has_news(self, content: str) -> bool:
        """Whether `grow` would look at anything."""
        return (
            len(content) <= rendering.LONGEST
            and content.find("\n", max(self._seen, self._look_again)) >= 0
        )

    def grow(self, content: str) -> None:
        """`content` begins with what it was before."""
        with self.lock:
            if self.has_news(content):
                try:
                    self._grow(content)
                except (RecursionError, ValueError):  # nothing that a parser likes: text stays text
                    self._look_again = len(content) * 2

    def finish(self, content: str, html: str) -> None:
        """Nothing is open any more. `html`: of the whole, which is what remains on the page."""
        with self.lock:
            if len(content) > rendering.LONGEST:
                return
            pieces, end = "".join(piece for piece, _end in self.closed), len(content)
            if html.startswith(pieces):
                self.closed.append((html[len(pieces) :], end))
            else:
                self.closed, self.epoch = [(html, end)], self.epoch + 1
            self._show("", end)

    def _grow(self, content: str) -> None:
        begin = self.closed[-1][1] if self.closed else 0
        end = content.rfind("\n") + 1
        fresh, self._seen = content[self._seen : end], end
        if self._fence and not any(self._closes(line) for line in fresh.splitlines()):
            return  # code is text until it ends
        lines = _LINE.findall(content[begin:end])
        waiting = opens_unclosed(lines)  # no formula yet: its lines could be taken for a list's
        lines = lines[:waiting]
        self._environment[CONTINUED] = begin > 0
        tokens = rendering.parse("".join(lines), self._environment)
        spans = _spans(tokens)
        offsets = [begin]
        for line in lines:
            offsets.append(offsets[-1] + len(line))
        while spans and (len(spans) > 1 or _is_closed(spans[0], tokens, lines)):
            span = spans.pop(0)
            html = self._html(tokens, span, self._environment)
            self.closed.append((html, offsets[min(span.stop, len(lines))]))
        self._fence = ""
        after = self.closed[-1][1] if self.closed else 0
        if not spans:
            self._show("", after + _blank(content[after:end]))
        elif spans[0].kind == "fence":
            self._open_code(tokens[spans[0].first], offsets[spans[0].line + 1])
        elif spans[0].kind in _CONTAINERS:
            self._show(self._html(tokens, spans[0], dict(self._environment)), offsets[-1])
        else:
            self._show("", offsets[spans[0].line])
        size = end - after
        self._look_again = end + size // 4 if size > SMALL and not self._fence else end

    def _open_code(self, fence: Token, text_from: int) -> None:
        self._fence = fence.markup
        empty = Token("fence", "code", 0, content="", info=fence.info, markup=fence.markup)
        self._show(rendering.render([empty], {}), text_from, in_code=True)

    def _show(self, open_html: str, text_from: int, in_code: bool = False) -> None:
        self.open_html, self.text_from, self.in_code = open_html, text_from, in_code
        self.version += 1

    def _html(self, tokens: list[Token], span: _Span, environment: dict) -> str:
        return rendering.render(tokens[span.first : span.after], environment)

    def _closes(self, line: str) -> bool:
        return _closes_fence(line, self._fence)


def _spans(tokens: list[Token]) -> list[_Span]:
    spans, first = [], 0
    for number, token in enumerate(tokens):
        if token.level == 0 and token.nesting <= 0:
            line, stop = tokens[first].map or (0, 0)
            spans.append(_Span(first, number + 1, line, stop, tokens[first].type))
            first = number + 1
    return spans


def _is_closed(span: _Span, tokens: list[Token], lines: list[str]) -> bool:
    """Whether nothing that follows can belong to the last block."""
    if span.kind == "fence":
        last = lines[min(span.stop, len(lines)) - 1]
        return span.stop - span.line > 1 and _closes_fence(last, tokens[span.first].markup)
    if span.kind == "thought":
        return bool(tokens[span.first].meta["closed"])
    if span.kind in _END_WITH_THEIR_LINE:
        return True
    follows_blank = any(not line.strip() for line in lines[span.stop : span.stop + 1])
    return span.kind in _END_WITH_A_BLANK_LINE and follows_blank


def _closes_fence(line: str, markup: str) -> bool:
    match = _FENCE.match(line)
    return bool(
        match
        and match[1][0] == markup[0]
        and len(match[1]) >= len(markup)
        and not line[match.end() :].strip()
    )


def _blank(text: str) -> int:
    """Characters of blank lines at its beginning."""
    return len(text) - len(text.lstrip("\r\n"))
