"""`**bold**` next to Chinese.

CommonMark asks for a space or punctuation around a delimiter that touches punctuation, and Chinese
has no spaces: `**注意：**请` stays asterisks there. The rules are those of markdown-cjk-friendly:
punctuation of the Chinese page counts as a letter, and a Chinese character beside a delimiter as
the space that Latin text would have.
"""

import re

from markdown_it import MarkdownIt
from markdown_it.common.utils import isMdAsciiPunct, isPunctChar, isWhiteSpace
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline.state_inline import Delimiter

# Han, kana, hangul, their punctuation, full-width forms
_CHINESE = re.compile(
    r"[\u1100-\u11ff\u2e80-\u303f\u3040-\u4dbf\u4e00-\ua4cf\ua960-\ua97f\uac00-\ud7ff"
    r"\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff]"
)


def befriend_chinese(parser: MarkdownIt) -> None:
    parser.inline.ruler.at("emphasis", _emphasis)


def _emphasis(state: StateInline, silent: bool) -> bool:
    """markdown-it's rule with other flanks."""
    start, marker = state.pos, state.src[state.pos]
    if silent or marker not in "*_":
        return False
    end = start
    while end < state.posMax and state.src[end] == marker:
        end += 1
    opens, closes = _flanks(state, start, end, marker)
    for _ in range(end - start):
        state.push("text", "", 0).content = marker
        state.delimiters.append(
            Delimiter(ord(marker), end - start, len(state.tokens) - 1, -1, opens, closes)
        )
    state.pos = end
    return True


def _flanks(state: StateInline, start: int, end: int, marker: str) -> tuple[bool, bool]:
    """(can open, can close)."""
    before = state.src[start - 1] if start else " "
    after = state.src[end] if end < state.posMax else " "
    blank_before, blank_after = isWhiteSpace(ord(before)), isWhiteSpace(ord(after))
    chinese_before, chinese_after = bool(_CHINESE.match(before)), bool(_CHINESE.match(after))
    mark_before = not chinese_before and _is_punctuation(before)
    mark_after = not chinese_after and _is_punctuation(after)
    left = not blank_after and (not mark_after or blank_before or mark_before or chinese_before)
    right = not blank_before and (not mark_before or blank_after or mark_after or chinese_after)
    if marker == "*":
        return left, right
    # `_` does not split words
    return (
        left and (not right or _is_punctuation(before)),
        right and (not left or _is_punctuation(after)),
    )


def _is_punctuation(character: str) -> bool:
    return isMdAsciiPunct(ord(character)) or isPunctChar(character)
