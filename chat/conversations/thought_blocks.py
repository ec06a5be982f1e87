"""A markdown block for what a model thought before it answered (chat/engine/thoughts.py): folded,
its text as it was written.
"""

import html

from markdown_it import MarkdownIt

from chat.engine.thoughts import CLOSE, OPEN

CONTINUED = "continued"  # in the environment: what is parsed is not an answer's beginning
# one rendering is for all readers, whatever their language
SUMMARY = "思考 · Thoughts"
TAGS = {"details", "summary"}
CLASSES = {"details": {"thought"}}


def add_thoughts(parser: MarkdownIt) -> None:
    parser.block.ruler.before("table", "thought", _thought, {"alt": []})
    parser.add_render_rule("thought", _rendered)


def _thought(state, start: int, end: int, silent: bool) -> bool:
    begin = state.bMarks[start] + state.tShift[start]
    if state.tokens or state.level or state.env.get(CONTINUED):
        return False
    if not state.src.startswith(OPEN, begin) or silent:
        return False
    at = state.src.find(CLOSE, begin)
    stop = at if at >= 0 else state.eMarks[end - 1]
    line = start
    while line < end - 1 and state.eMarks[line] < stop:
        line += 1
    token = state.push("thought", "details", 0)
    token.content = state.src[begin + len(OPEN) : stop].strip()
    token.map, token.meta = [start, line + 1], {"closed": at >= 0}
    rest = state.src[stop + len(CLOSE) : state.eMarks[line]].strip() if at >= 0 else ""
    if rest:  # the answer begins on the same line
        state.push("paragraph_open", "p", 1).map = [line, line + 1]
        inline = state.push("inline", "", 0)
        inline.content, inline.map, inline.children = rest, [line, line + 1], []
        state.push("paragraph_close", "p", -1)
    state.line = line + 1
    return True


def _rendered(renderer, tokens, index, options, environment) -> str:
    text = tokens[index].content
    if not text:
        return ""
    return (
        f'<details class="thought"><summary>{SUMMARY}</summary>'
        f"<p>{html.escape(text)}</p></details>\n"
    )
