"""Formulas in markdown, `\\( \\)`, `\\[ \\]`, `$ $` and `$$ $$`, become MathML on the server.

Every browser draws MathML by itself: no script, no font, no inline style, so the page's policy
stays as strict as it is and answers look the same without JavaScript. What cannot be converted is
shown as it was written.
"""

import html
import re
from functools import lru_cache
from xml.etree import ElementTree

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

LONGEST = 2000  # characters; a formula of this size takes a tenth of a second
MOST_CHARACTERS = 20_000  # of all formulas of an answer; what comes behind is shown as written
MOST_LINES = 60
TAGS = (
    "math mrow mi mo mn mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover "
    "mtable mtr mtd"
)
ATTRIBUTES = {
    "math": {"display"},
    "mi": {"mathvariant"},
    "mo": {"stretchy", "fence", "form", "accent"},
    "mover": {"accent"},
    "mfrac": {"linethickness"},
    "mspace": {"width"},
    "mtd": {"columnalign"},
}
# Prices are no formulas: as in pandoc nothing is blank inside the dollars and no digit follows;
# nor does a letter or digit stand before them, nor Chinese inside without a command.
_DOLLARS = re.compile(r"\$(?![\s$])((?:[^$\\\n]|\\.){1,2000}?)(?<!\s)\$(?![A-Za-z0-9$])")
_WORD = re.compile(r"[A-Za-z0-9$]$")
_CHINESE = re.compile(r"[\u3000-\u9fff\uff00-\uffef]")
_BLOCK = {r"\[": r"\]", "$$": "$$"}
_INLINE = {r"\(": r"\)", **_BLOCK}


def add_formulas(parser: MarkdownIt) -> None:
    parser.inline.ruler.before("escape", "formula", _inline)
    # a formula's line may begin with "+" or "-" and is no list then
    parser.block.ruler.before(
        "fence", "formula", _block, {"alt": ["paragraph", "reference", "blockquote", "list"]}
    )
    parser.add_render_rule("formula", _rendered)


def opens_unclosed(lines: list[str]) -> int | None:
    """The first of these lines that begins a display formula whose end has not come; None when
    there is none. A blank line ends the waiting.
    """
    opened, closer = None, ""
    for number, line in enumerate(lines):
        text = line.strip()
        if opened is not None:
            if not text or closer in text:
                opened = None
            continue
        closer = _BLOCK.get(text[:2], "")
        if closer and closer not in text[2:]:
            opened = number
    return opened


def _inline(state: StateInline, silent: bool) -> bool:
    """`\\(...\\)`, `\\[...\\]`, `$$...$$` and `$...$` in running text."""
    start = state.pos
    if state.src[start] not in "\\$":
        return False
    opener = state.src[start : start + 2]
    if opener in _INLINE:
        end = state.src.find(_INLINE[opener], start + 2, min(state.posMax, start + LONGEST))
        if end < 0 or not state.src[start + 2 : end].strip():
            return False
        tex, stop, display = state.src[start + 2 : end], end + 2, opener in _BLOCK
    else:
        match = _DOLLARS.match(state.src, start, state.posMax)
        if match is None or _WORD.search(state.src[max(0, start - 1) : start]):
            return False
        if _CHINESE.search(match[1]) and "\\" not in match[1]:
            return False
        tex, stop, display = match[1], match.end(), False
    if not silent:
        _push(state, tex, state.src[start:stop], display)
    state.pos = stop
    return True


def _block(state: StateBlock, first: int, last: int, silent: bool) -> bool:
    """A display formula on lines of its own."""
    start = state.bMarks[first] + state.tShift[first]
    closer = _BLOCK.get(state.src[start : start + 2])
    if closer is None or state.is_code_block(first):
        return False
    lines = []
    for number in range(first, min(last, first + MOST_LINES)):
        if state.sCount[number] < state.blkIndent and number > first:
            return False
        line = state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]]
        line = line[2:] if number == first else line
        end = line.find(closer)
        if end >= 0:
            if line[end + 2 :].strip():  # a sentence goes on behind it
                return False
            lines.append(line[:end])
            break
        if not line.strip() and number > first:
            return False
        lines.append(line)
    else:
        return False
    tex = "\n".join(lines).strip()
    if not tex:
        return False
    if not silent:
        stop = state.eMarks[number]
        token = _push(state, tex, state.src[start:stop], display=True)
        token.block, token.map = True, [first, number + 1]
        state.line = number + 1
    return True


def _push(state, tex: str, written: str, display: bool):
    token = state.push("formula", "math", 0)
    token.content, token.markup, token.meta = tex, written, {"display": display}
    return token


def _rendered(renderer, tokens, index, options, environment) -> str:
    token = tokens[index]
    display = token.meta["display"]
    environment["formulas"] = environment.get("formulas", 0) + len(token.content)
    affordable = environment["formulas"] <= MOST_CHARACTERS
    math = (affordable and _mathml(token.content, display)) or html.escape(token.markup)
    if not display:
        return math
    # inside a paragraph there can be no div
    return f'<div class="formula">{math}</div>\n' if token.block else math


@lru_cache(1024)
def _mathml(tex: str, display: bool) -> str:
    """MathML of a formula, not yet sanitised; "" when it is none."""
    from latex2mathml.converter import convert_to_element  # half a second, for those who need it

    if len(tex) > LONGEST:
        return ""
    tex = re.sub(r"\\(begin|end)\{(aligned|gathered)\}", r"\\\1{align*}", tex)
    try:
        element = convert_to_element(tex, display="block" if display else "inline")
    except Exception:  # its parser raises whatever the formula's fault leads to
        return ""
    for part in element.iter():
        # it writes characters as entities, which here would be escaped once more
        part.text = html.unescape(part.text) if part.text else None
        if (part.text or "").startswith("\\"):  # a command that it does not know
            return ""
        part.attrib.pop("xmlns", None)
    return ElementTree.tostring(element, encoding="unicode")
