"""The newcomer's whole way through the portal, in a real Chromium against `manage.py up`:
everything real, only small.

`wait_for_function` does not work under the portal's Content-Security-Policy; locators do.
"""

import json
import re
import shutil

import pytest

from chat.conversations.rendering import to_html
from tests.support import ROOT
from tests.support.live_portal import Portal, wait_for

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("portal"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
PATIENCE = 180_000  # ms; a run takes seconds, a crowded machine longer


@pytest.fixture(scope="module")
def portal(tmp_path_factory):
    with Portal(tmp_path_factory.mktemp("portal")) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(portal, browser):
    """Logged in as the first administrator; the test fails when the page's script does."""
    wait_for(portal.healthy, 90, "the model")
    context = browser.new_context(base_url=portal.url, viewport={"width": 1280, "height": 800})
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda entry: (
            faults.append(entry.text) if "Content Security Policy" in entry.text else None
        ),
    )
    page.goto("/")
    expect(page).to_have_url(re.compile("/login/"))
    page.fill("#id_username", "admin")
    page.fill("#id_password", portal.password())
    page.press("#id_password", "Enter")
    expect(page.locator(".steps > li")).to_have_count(5)
    yield page
    context.close()
    assert faults == []


def say(page, text):
    page.fill("#say", text)
    page.press("#say", "Enter")


def answers(page):
    return page.locator(".turn:not(.me)")


def finished(page, number):
    """The `number`-th answer of the conversation once it is complete."""
    answer = answers(page).nth(number - 1)
    expect(answer).to_have_attribute("data-status", "complete", timeout=PATIENCE)
    return answer


def test_chat_upload_tune_evaluate_and_chat_with_the_prefix_on_and_off(page, tmp_path):
    # chat with the base
    page.goto("/chat/")
    expect(page.locator("#greeting")).to_be_visible()
    say(page, "你好")
    page.wait_for_url(re.compile(r"/chat/\d+/"))
    assert finished(page, 1).locator("[data-part=text]").inner_text().strip()
    conversation = page.url

    # upload: the columns are suggested, a bad file is refused with its lines
    sample = (ROOT / "chat" / "starter" / "sample" / "train.json").read_text().splitlines()[:60]
    bad = tmp_path / "bad.json"
    bad.write_text("\n".join([*sample[:3], "not json", *sample[3:6]]))
    page.goto("/datasets/upload/")
    page.set_input_files("[name=file]", bad)
    expect(page.locator("[name=prompt_column]")).to_have_value("content")
    page.click("#upload button[type=submit]")
    expect(page.locator("#upload-part [role=alert] .fold-body")).to_contain_text("4")
    good = tmp_path / "good.json"
    good.write_text("\n".join(sample))
    page.set_input_files("[name=file]", good)
    page.fill("[name=name]", "小样")
    page.click("#upload button[type=submit]")
    page.wait_for_url(re.compile(r"/datasets/\d+/$"))
    expect(page.locator(".stats")).to_contain_text("60")
    page.fill("[name=validation]", "6")
    page.locator("form[action$='/split/'] button").click()
    expect(page.locator(".stats")).to_contain_text("54")

    # tune: a wrong value is said at its field, then a short run
    page.locator("a[href^='/tuning/new/?dataset=']").click()
    page.fill("[name=name]", "小样微调")
    page.fill("[name=pre_seq_len]", "0")
    page.locator("#run-form button[type=submit]").click()
    expect(page.locator("#id_pre_seq_len_error")).to_be_visible()
    expect(page.locator("#id_pre_seq_len")).to_have_attribute("aria-invalid", "true")
    values = {
        "pre_seq_len": 8,
        "max_steps": 6,
        "save_steps": 6,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
    }
    for name, value in values.items():
        page.fill(f"[name={name}]", str(value))
    expect(page.locator("#panel-cli")).to_contain_text("--max-steps 6")
    page.locator("#run-form button[type=submit]").click()
    page.wait_for_url(re.compile(r"/tuning/\d+/$"))

    # watch: the page refreshes itself until the adapter is there, with the curve drawn
    expect(page.locator("#adapters a[href^='/chat/']")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#loss-chart canvas")).to_be_visible()
    expect(page.locator("#log .log")).to_contain_text("6")

    # evaluate
    page.locator("#adapters a[href^='/evaluations/new/']").click()
    page.fill("[name=max_examples]", "3")
    page.locator("main form button[type=submit]").click()
    page.wait_for_url(re.compile(r"/evaluations/\d+/$"))
    expect(page.locator(".scale .ci1")).to_have_count(4, timeout=PATIENCE)
    expect(page.locator(".scale .ci0")).to_have_count(4, timeout=PATIENCE)
    expect(page.locator("#rows tbody tr")).to_have_count(3, timeout=PATIENCE)

    # chat with the tuned model: on, then off, in the conversation from before
    page.goto(conversation)
    page.locator(".chip", has_text="小样微调").click()
    say(page, "类型#裤*颜色#米白")
    expect(finished(page, 2).locator(".who")).to_have_class(re.compile("tuned"))
    page.locator(".chip").first.click()
    say(page, "类型#裤*颜色#米白")
    expect(finished(page, 3).locator(".who")).not_to_have_class(re.compile("tuned"))
    page.goto("/")
    expect(page.locator(".steps .done")).to_have_count(5)


def test_an_answer_survives_a_reload_and_can_be_written_again(page):
    page.goto("/chat/")
    say(page, "你能做什么？")
    page.wait_for_url(re.compile(r"/chat/\d+/"))
    page.reload()
    before = finished(page, 1).locator("[data-part=text]").inner_text()
    page.reload()
    assert finished(page, 1).locator("[data-part=text]").inner_text() == before
    page.locator(".retry:visible").click()  # answered again: still one turn
    finished(page, 1)
    expect(page.locator(".turn")).to_have_count(2)


def test_a_message_that_does_not_fit_comes_back_to_be_shortened(page):
    page.goto("/chat/")
    say(page, "你好")
    page.wait_for_url(re.compile(r"/chat/\d+/"))
    finished(page, 1)
    long = "很长" * 3000
    say(page, long)
    expect(answers(page).nth(1)).to_have_attribute("data-status", "failed", timeout=PATIENCE)
    # the other way out: a new conversation
    expect(answers(page).nth(1).locator("[data-context]")).to_be_visible()
    hour = answers(page).nth(1).locator("time").inner_text()[:3]
    assert page.input_value("#say") == long
    say(page, "你好")
    expect(finished(page, 3).locator("[data-context]")).to_be_hidden()
    page.reload()
    # the portal's zone, not the browser's
    assert hour == answers(page).nth(1).locator("time").inner_text()[:3]


def test_code_in_an_answer_is_coloured_and_copied_without_its_frame(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto("/chat/")
    page.fill("#say", "第一行")
    page.press("#say", "Shift+Enter")
    page.keyboard.type("第二行")
    page.press("#say", "Enter")
    page.wait_for_url(re.compile(r"/chat/\d+/"))
    finished(page, 1)
    assert page.locator(".bubble").inner_text() == "第一行\n第二行"
    # the starter cannot write code
    written = to_html('看：\n\n```python\nprint("你好")\n```\n\n完。')

    def with_code(route):
        answer = route.fetch()
        told = re.sub(
            r'(<div class="md" data-part="text">).*?(</div>\s*<div class="notice")',
            rf"\1{written}\2",
            answer.text(),
            flags=re.S,
        )
        route.fulfill(response=answer, body=told)

    page.route(page.url, with_code)
    page.reload()
    expect(page.locator(".code .hljs-string")).to_have_text('"你好"')
    page.locator(".code [data-copy]").click()
    expect(page.locator(".toast")).to_have_count(1)
    assert page.evaluate("navigator.clipboard.readText()") == 'print("你好")'


def test_a_long_answer_is_acknowledged_before_the_server_gives_up_but_not_frame_by_frame(page):
    page.goto("/chat/")
    say(page, "你好")
    page.wait_for_url(re.compile(r"/chat/\d+/"))
    message = int(finished(page, 1).get_attribute("data-message")) + 1
    heard = []

    def serve(socket):
        socket.on_message(lambda text: heard.append(json.loads(text)))
        for seq in range(11_000, 91_000, 10_000):
            frame = {"type": "message.delta", "message": message, "seq": seq, "text": "字" * 10_000}
            socket.send(json.dumps(frame, ensure_ascii=False))

    page.route_web_socket(re.compile("/ws/conversations/"), serve)
    page.reload()
    expect(answers(page).nth(1)).to_have_attribute("data-seq", "81000")
    assert [frame["seq"] for frame in heard] == [41_000, 81_000]


def test_the_language_and_the_theme_stay_as_chosen(page):
    page.goto("/account/")
    page.locator("main button[name=language][value=en]").click()
    expect(page.locator("html")).to_have_attribute("lang", "en")
    page.locator("main label:has(input[name=theme][value=dark])").click()
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    expect(page.locator("html")).to_have_attribute("lang", "en")


@pytest.mark.parametrize("width", [375, 1440])
def test_no_page_is_wider_than_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    paths = [
        "/",
        "/chat/",
        "/datasets/",
        "/datasets/1/",
        "/datasets/upload/",
        "/tuning/",
        "/tuning/new/",
        "/evaluations/",
    ]
    for path in [*paths, "/evaluations/new/", "/tasks/", "/account/", "/checkpoints/new/"]:
        page.goto(path)
        sizes = json.loads(
            page.evaluate("JSON.stringify([document.documentElement.scrollWidth, innerWidth])")
        )
        assert sizes[0] <= sizes[1], path
