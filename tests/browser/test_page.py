"""The conversation's page as people use it, in a real Chromium: side by side, branches, keys, input
methods, a screen reader's view of every state, what a page weighs.
"""

import re
from urllib.parse import urlsplit

import pytest

from tests.browser.test_answers import page, web
from tests.browser.test_loop import CHROMIUM, PATIENCE, answers, browser, expect, finished, say

__all__ = ["browser", "page", "web"]  # fixtures

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("answers"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
LIGHT = 250_000  # bytes that a page may take
axe = pytest.importorskip("axe_playwright_python.sync_playwright")


def faults_of(page) -> list[str]:
    """What axe finds serious or critical on the page as it is now, colours no longer changing."""
    # one that is paused or repeated never ends
    page.evaluate(
        """() => Promise.race([
            Promise.all(document.getAnimations().map(each => each.finished.catch(() => null))),
            new Promise(done => setTimeout(done, 500)),
        ])"""
    )
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{page.url} {one['id']}: {one['nodes'][0]['html'][:160]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def begin(page, text="write 好", models=()):
    for model in models:
        page.locator(f"#compare [value={model}]").evaluate("box => box.click()")
    say(page, text)
    page.wait_for_url(re.compile(r"/chat/\d+/"))


def test_models_answer_side_by_side_and_the_better_one_goes_on(page):
    page.locator("#compare summary").click()
    for value in ("base-1", "adapter-1", "adapter-2", "adapter-3"):
        page.locator(f"#compare [value={value}]").check()
    expect(page.locator("#compare [value=adapter-4]")).to_be_disabled()
    page.keyboard.press("Escape")
    expect(page.locator("#compare summary")).to_be_focused()
    begin(page, "every 0.3 words 4")
    columns = page.locator(".compared .turn")
    expect(columns).to_have_count(4)
    expect(page.locator(".compared [data-status=streaming]")).to_have_count(4)  # in one batch
    expect(page.locator(".compared [data-status=complete]")).to_have_count(4, timeout=PATIENCE)
    texts = columns.locator("[data-part=text]").all_inner_texts()
    assert len(set(texts)) == 4
    page.locator("[name=better]").nth(2).click()
    expect(page.locator(".verdict .badge")).to_have_count(1)
    say(page, "write 然后")
    finished(page, 5)
    page.reload()
    expect(answers(page)).to_have_count(2)
    expect(answers(page).nth(0)).to_contain_text(texts[2])
    expect(page.locator(".branches")).to_contain_text("3/4")


def test_a_question_is_asked_in_another_way_and_the_branches_are_walked(page):
    begin(page, "write 甲")
    finished(page, 1)
    say(page, "write 乙")
    finished(page, 2)
    page.locator("[data-edit]").last.click()  # of a question that came without loading the page
    edited = page.locator("#edited")
    expect(edited).to_be_focused()
    expect(edited).to_have_value("write 乙")
    edited.fill("write 丙")
    page.keyboard.press("Enter")
    finished(page, 2)
    expect(answers(page).nth(1)).to_contain_text("丙")
    page.locator(".branches button").first.click()
    expect(answers(page).nth(1)).to_contain_text("乙")


def test_what_is_copied_is_the_markdown(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    begin(page, "write **粗** `x`")
    finished(page, 1).locator("[data-copy-source]").click()
    expect(page.locator(".toast")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "**粗** `x`"


KEY = """(field, [before, after]) => {
  const send = (type, init) => field.dispatchEvent(new KeyboardEvent(type, {
    key: "Enter", bubbles: true, cancelable: true, ...init }));
  const compose = (type) => field.dispatchEvent(new CompositionEvent(type, { bubbles: true }));
  compose("compositionstart");
  field.value = "你好";
  if (before) send("keydown", { isComposing: true, keyCode: 229 });
  compose("compositionend");
  if (after) send("keydown", { isComposing: false, keyCode: 229 });
}"""


@pytest.mark.parametrize("order", [(True, False), (False, True)], ids=["chromium", "safari"])
def test_enter_that_chooses_a_word_sends_nothing(page, order):
    """Chromium says keydown, then compositionend; Safari compositionend, then keydown."""
    sent = page.locator("#composer").evaluate_handle(
        "form => { const sent = []; form.addEventListener('submit', event => "
        "{ sent.push(1); event.preventDefault(); }, true); return sent; }"
    )
    field = page.locator("#say")
    field.evaluate(KEY, list(order))
    page.wait_for_timeout(100)
    assert sent.json_value() == []
    expect(field).to_have_value("你好")
    field.press("Enter")  # and the next one does
    assert sent.json_value() == [1]


def test_safaris_enter_without_its_key_code_sends_nothing_either(page):
    sent = page.locator("#composer").evaluate_handle(
        "form => { const sent = []; form.addEventListener('submit', event => "
        "{ sent.push(1); event.preventDefault(); }, true); return sent; }"
    )
    page.locator("#say").evaluate(
        KEY.replace("isComposing: false, keyCode: 229", ""), [False, True]
    )
    assert sent.json_value() == []


PAGES = [
    "/",
    "/chat/",
    "/chat/search/?q=write",
    "/datasets/",
    "/datasets/upload/",
    "/tuning/",
    "/tuning/new/",
    "/evaluations/",
    "/evaluations/new/",
    "/tasks/",
    "/adapters/",
    "/checkpoints/",
    "/checkpoints/new/",
    "/account/",
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_any_page(page, scheme):
    page.emulate_media(color_scheme=scheme)
    found = []
    for path in PAGES:
        page.goto(path)
        found += faults_of(page)
    assert found == []


@pytest.mark.parametrize("width", [375, 768, 1440])
def test_axe_finds_nothing_serious_in_any_state_of_a_conversation(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme="dark" if width == 768 else "light")
    found = []

    def look():
        found.extend(faults_of(page))
        sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert sizes[0] <= sizes[1], page.url

    page.locator(".composer-bar summary").first.click()
    look()
    page.keyboard.press("Escape")
    page.locator("#compare summary").click()
    look()
    page.keyboard.press("Escape")
    begin(page, "every 1 words 3", models=("base-1", "adapter-1"))
    expect(page.locator("[data-status=streaming]").first).to_be_visible()
    look()  # written
    expect(page.locator(".compared [data-status=complete]")).to_have_count(2, timeout=PATIENCE)
    look()  # to be judged
    page.locator("[name=better]").first.click()
    expect(page.locator(".verdict .badge")).to_be_visible()
    look()
    say(page, "refuse context_length_exceeded")
    expect(page.locator("[data-status=failed]")).to_be_visible(timeout=PATIENCE)
    look()
    page.locator("[data-edit]").first.click()
    expect(page.locator("#edited")).to_be_visible()
    look()
    page.locator("summary[aria-label]").last.click()
    page.locator("[data-open=share]").click()
    page.locator("#share button[type=submit]").click()
    expect(page.locator("#share input[readonly]")).to_be_visible()
    look()
    link = page.locator("#share input[readonly]").input_value()
    page.locator("#share [data-close]").click()
    page.locator("[data-correct]:visible").first.click()
    expect(page.locator("#correct")).to_be_visible()
    look()
    page.goto(link)
    look()
    assert found == []


def test_pages_are_light(page):
    """Everything a first visit loads, as it goes over the wire."""
    for path in ("/chat/", "/", "/datasets/", "/tuning/new/"):
        context = page.context.browser.new_context(base_url=page.url)
        context.add_cookies(page.context.cookies())
        fresh, sizes = context.new_page(), []
        fresh.on(
            "requestfinished",
            lambda request, sizes=sizes: sizes.append(
                request.sizes()["responseBodySize"] + request.sizes()["responseHeadersSize"]
            ),
        )
        fresh.goto(path, wait_until="networkidle")
        assert urlsplit(fresh.url).path == path
        assert 0 < sum(sizes) < LIGHT, (path, sum(sizes))
        context.close()
