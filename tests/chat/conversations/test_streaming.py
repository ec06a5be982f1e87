"""Markdown while it is written: in the end what `to_html` makes of the whole, and never less safe
on the way.
"""

import random

import pytest

from chat.conversations import streaming
from chat.conversations.rendering import to_html
from chat.conversations.streaming import StreamedMarkdown
from tests.chat.conversations.test_rendering import HOSTILE

BLOCKS = [
    "# 标题\n",
    "一段，**粗**，`x`。\n第二行\n",
    "Setext\n===\n",
    "- 一\n- 二 **x**\n\n  在二里\n\n  ```python\n  a\n  ```\n- 三\n",
    "1. x\n2. y\n后面接着\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "```python\ndef f():\n\n    return 1\n```\n",
    "~~~~\n~~~\n```\n~~~~\n",
    "> 引\n> 用\n",
    "所以：\n\\[\na\n+ b\n\\]\n",
    "$$\nx\n\n- y\n$$\n",
    "    code\n\n    more\n",
    "---\n",
    "* a\n+ b\n1) c\n",
    "<div>\n\n**x**\n\n</div>\n",
    "a\r\nb\rc\r\n\r\nd\n",
    "![x](https://evil.example/a.png)\n",
    *[text + "\n" for text in HOSTILE],
]


def written(text: str, chance: random.Random):
    """(text so far, what is rendered) after each piece."""
    markdown, so_far = StreamedMarkdown(), 0
    while so_far < len(text):
        so_far = min(len(text), so_far + chance.randint(1, 12))
        markdown.grow(text[:so_far])
        yield text[:so_far], markdown
    markdown.finish(text, to_html(text))
    yield text, markdown


@pytest.mark.parametrize("seed", range(40))
def test_blocks_in_any_order_and_in_any_pieces_end_as_the_whole(seed):
    chance = random.Random(seed)
    text = "".join(
        block + chance.choice(["", "\n", "\n\n"]) for block in chance.sample(BLOCKS, k=12)
    )
    kept: list[str] = []
    for so_far, markdown in written(text, chance):
        closed = [html for html, _end in markdown.closed]
        if markdown.epoch == 0:
            assert closed[: len(kept)] == kept, "what has been shown stays"
            kept = closed
        begin = markdown.closed[-1][1] if markdown.closed else 0
        assert begin <= markdown.text_from <= len(so_far)
    assert "".join(closed) == to_html(text)


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_answers_are_never_rendered_over(seed):
    chance = random.Random(seed)
    text = "\n".join(chance.sample(BLOCKS[:10], k=8))
    for _so_far, markdown in written(text, chance):
        assert markdown.epoch == 0


def test_a_link_that_is_defined_behind_its_use_is_put_right_at_the_end():
    text = "见 [这里][r]。\n\n[r]: https://a.example\n"
    states = [
        (m.epoch, "".join(html for html, _end in m.closed)) for _s, m in written(text, random)
    ]
    assert states[-2] == (0, "<p>见 [这里][r]。</p>\n") and states[-1] == (1, to_html(text))


def test_the_open_block_is_a_list_a_table_or_code_and_a_paragraph_is_text():
    def now(text):
        markdown = StreamedMarkdown()
        markdown.grow(text)
        return markdown.open_html, text[markdown.text_from :], markdown.in_code

    assert now("- **一**\n- 二") == ("<ul>\n<li><strong>一</strong></li>\n</ul>\n", "- 二", False)
    html, text, in_code = now("|a|\n|-|\n|1|\n|2")
    assert "<td>1</td>" in html and text == "|2"
    html, text, in_code = now("```python\nx = 1\n  y")
    assert 'class="language-python"></code>' in html and (text, in_code) == ("x = 1\n  y", True)
    assert now("**一**\n**二") == ("", "**一**\n**二", False)
    assert now("一\n\n\n\n二") == ("", "二", False)


def test_a_long_open_list_is_not_rendered_with_every_line(monkeypatch):
    rendered = []
    render = streaming.rendering.render
    monkeypatch.setattr(
        streaming.rendering, "render", lambda *a: rendered.append(len(a[0])) or render(*a)
    )
    markdown, text = StreamedMarkdown(), ""
    for number in range(200):
        text += f"- item number {number}\n"
        markdown.grow(text)
    assert 90 < len(rendered) < 130
