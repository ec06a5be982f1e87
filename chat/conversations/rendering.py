"""Model output becomes HTML here and nowhere else.

markdown-it-py without raw HTML makes the markup, nh3 lets only known tags through it. No image is
ever loaded: a picture's address could carry the conversation away. Code blocks have the classes of
the stylesheet (`.code > .code-head + pre`); the page's script adds the copy button to `.code-head`.
"""

import html
import re

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token

from chat.conversations.emphasis import befriend_chinese
from chat.conversations.formulas import ATTRIBUTES as FORMULA_ATTRIBUTES
from chat.conversations.formulas import TAGS as FORMULA_TAGS
from chat.conversations.formulas import add_formulas
from chat.conversations.thought_blocks import CLASSES as THOUGHT_CLASSES
from chat.conversations.thought_blocks import TAGS as THOUGHT_TAGS
from chat.conversations.thought_blocks import add_thoughts

# Markdown of this size takes about a second to parse; anything longer is shown as it was written.
LONGEST = 100_000
_SCHEME = re.compile(r"(?<![A-Za-z0-9])https?$")
# no quotes, brackets, parentheses, nor Chinese
_ADDRESS = re.compile(r"https?://[!#-&*-;=?-Z\\^_a-z|~]{1,2000}")
_LANGUAGE = re.compile(r"[\w+#.-]{1,30}")
_TASK = re.compile(r"\[([ xX])\](?=\s)")


def _code_block(renderer, tokens, index, options, environment) -> str:
    token = tokens[index]
    words = token.info.split(maxsplit=1)
    language = words[0] if words and _LANGUAGE.fullmatch(words[0]) else ""
    mark = f' class="language-{language}"' if language else ""
    return (
        f'<div class="code"><div class="code-head"><span>{html.escape(language)}</span></div>'
        f'<pre tabindex="0"><code{mark}>{html.escape(token.content)}</code></pre></div>\n'
    )


def _bare_address(state, silent) -> bool:
    """An inline rule: `https://...` in running text is a link, and ends where Chinese text or
    punctuation goes on.

    linkify-it takes "https://a.b，然后" for one address, "manage.py" for another, and seconds for a
    hostile text.
    """
    if state.linkLevel or not state.src.startswith("://", state.pos):
        return False
    scheme = _SCHEME.search(state.pending[-6:])
    if scheme is None:
        return False
    match = _ADDRESS.match(state.src, state.pos - len(scheme[0]), state.posMax)
    if match is None:
        return False
    address = match[0].rstrip(".,:;!?*_~")
    if not silent:
        state.pending = state.pending[: -len(scheme[0])]
        state.push("link_open", "a", 1).attrs = {"href": state.md.normalizeLink(address)}
        state.push("text", "", 0).content = address
        state.push("link_close", "a", -1)
    state.pos += len(address) - len(scheme[0])
    return True


def _tasks(state) -> None:
    """A core rule: `- [ ] to do` and `- [x] done` get a box, as text."""
    for number, token in enumerate(state.tokens):
        if token.type == "inline" and state.tokens[number - 2].type == "list_item_open":
            box = _TASK.match(token.content)
            if box:
                token.content = ("☐" if box[1] == " " else "☑") + token.content[3:]


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True})
    parser.enable(["table", "strikethrough"]).disable("image")
    parser.inline.ruler.after("text", "bare_address", _bare_address)
    parser.core.ruler.before("inline", "tasks", _tasks)
    befriend_chinese(parser)
    add_formulas(parser)
    add_thoughts(parser)
    parser.add_render_rule("fence", _code_block)
    parser.add_render_rule("code_block", _code_block)
    parser.add_render_rule("table_open", lambda *_: '<div class="table-wrap"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return parser


_markdown = _parser()
_TAGS = (
    "p br hr strong em s blockquote h1 h2 h3 h4 h5 h6 ul ol li a div span pre code "
    "table thead tbody tr th td"
)
_sanitiser = nh3.Cleaner(
    tags={*_TAGS.split(), *FORMULA_TAGS.split(), *THOUGHT_TAGS},
    attributes={
        "a": {"href", "title"},
        "ol": {"start"},
        "pre": {"tabindex"},
        "code": {"class"},
        **FORMULA_ATTRIBUTES,
    },
    allowed_classes={"div": {"code", "code-head", "table-wrap", "formula"}, **THOUGHT_CLASSES},
    url_schemes={"http", "https", "mailto"},
    url_relative="deny",  # a link within the portal would be the model's wish, not the portal's
    link_rel="noopener noreferrer nofollow",
    set_tag_attribute_values={"a": {"target": "_blank"}},
)


def to_html(text: str) -> str:
    """Safe HTML of an answer written in markdown. Never raises, whatever the model wrote."""
    if len(text) > LONGEST:
        return _as_written(text)
    try:
        environment: dict = {}
        return render(parse(text, environment), environment)
    except (RecursionError, ValueError):  # a malformed address, a depth that no parser likes
        return _as_written(text)


def parse(text: str, environment: dict) -> list[Token]:
    """`environment` keeps what parts of one answer share: links defined somewhere else in it."""
    return _markdown.parse(text, environment)


def render(tokens: list[Token], environment: dict) -> str:
    """Safe HTML of whole blocks."""
    return _sanitiser.clean(_markdown.renderer.render(tokens, _markdown.options, environment))


def _as_written(text: str) -> str:
    return f'<div class="code-plain"><pre class="wrap">{html.escape(text)}</pre></div>'
