"""A checkpoint whose chat template is strict (no system role, strict turns, and here a word that it
refuses) behind every door: what can be merged is, the rest is a sentence that quotes the template,
and the conversation goes on.
"""

import asyncio
import json

import pytest
import websockets
from transformers import AutoTokenizer

from tests.support import chat_families
from tests.support.live_portal import Portal, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("web")]
REFUSAL = "This template takes no bananas"
SHORT = {"temperature": 0, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def portal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strict")
    model = chat_families.write("Gemma 2", folder / "gemma")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if 'banana' in message['content'] %}"
        "{{ raise_exception('" + REFUSAL + "') }}{% endif %}{% endfor %}" + tokenizer.chat_template
    )
    tokenizer.save_pretrained(model)
    with Portal(folder / "data") as running:
        wait_for(lambda: running.healthy(worker=False), 120, "the web process")
        running.manage("add_checkpoint", str(model), "--name", "strict", "--default")
        wait_for(
            lambda: (running.healthy() or {}).get("worker", {}).get("checkpoint") == "strict",
            180,
            "the worker",
        )
        yield running


@pytest.fixture(scope="module")
def key(portal):
    return portal.manage("create_api_key", "admin").strip()


def completed(portal, key, messages):
    body = {"model": "strict", "messages": messages, "temperature": 0, "max_tokens": 4}
    return portal.call("POST", "/v1/chat/completions", body, key=key)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        [{"role": "user", "content": "hello"}, {"role": "user", "content": "world"}],
        [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "world"},
        ],
        [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "world"}],
    ],
    ids=["a system message", "two questions", "an empty answer", "an answer first"],
)
def test_what_people_send_is_merged_or_refused_with_the_templates_words(portal, key, messages):
    status, body = completed(portal, key, messages)
    if messages[0]["role"] == "assistant":  # nothing to merge it with
        assert status == 400 and "must alternate" in body["error"]["message"], body
    else:
        assert status == 200 and body["usage"]["completion_tokens"] > 0, body


def test_programs_get_a_400_that_quotes_the_template(portal, key):
    status, body = completed(portal, key, [{"role": "user", "content": "a banana"}])
    assert status == 400 and body["error"]["code"] == "template_refused"
    assert REFUSAL in body["error"]["message"]
    status, body = portal.call("POST", "/", {"prompt": "a banana", "history": []}, key=key)
    assert status == 400 and REFUSAL in json.dumps(body)


def answered(portal, key, conversation) -> dict:
    def last():
        messages = portal.get(f"/api/v1/conversations/{conversation}/messages/", key=key)[1]
        answer = max(messages["results"], key=lambda message: message["id"])
        return answer if answer["status"] not in ("queued", "streaming") else None

    return wait_for(last, 60, "an answer")


def test_a_conversation_goes_on_after_a_refusal(portal, key):
    made = portal.call("POST", "/api/v1/conversations/", {"title": "fruit"}, key=key)[1]["id"]
    address = f"/api/v1/conversations/{made}/messages/"
    portal.call("POST", address, {"content": "a banana", "sampling": SHORT}, key=key)
    refused = answered(portal, key, made)
    assert refused["status"] == "failed" and refused["error"]["code"] == "template_refused"
    assert REFUSAL in refused["error"]["message"]
    portal.call("POST", address, {"content": "an apple", "sampling": SHORT}, key=key)
    assert answered(portal, key, made)["status"] == "complete"  # without what was refused


async def test_the_page_is_told_and_goes_on(portal, key):
    made = portal.call("POST", "/api/v1/conversations/", {"title": "fruit"}, key=key)[1]["id"]
    address = f"{portal.url.replace('http', 'ws')}/ws/conversations/{made}/"
    headers = {"Authorization": f"Bearer {key}"}

    async def said(page, content: str) -> dict:
        await page.send(json.dumps({"type": "message.send", "content": content, "sampling": SHORT}))
        async with asyncio.timeout(60):
            async for text in page:
                frame = json.loads(text)
                if frame["type"] in ("message.failed", "message.finished", "error"):
                    return frame
        raise AssertionError("the socket ended")

    async with websockets.connect(address, additional_headers=headers) as page:
        refused = await said(page, "a banana")
        assert REFUSAL in json.dumps(refused)
        assert (await said(page, "an apple"))["type"] == "message.finished"
