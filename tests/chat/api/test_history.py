"""A tuned model is asked as it was trained: with the earlier turns, or with the question alone."""

import json

import pytest
from channels.db import database_sync_to_async

from chat import registry
from chat.conversations.messages import request_for
from chat.models import Adapter, Message
from tests.chat.api.test_websocket import hear, socket
from tests.support.folders import adapter_folder

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def single_turns(base, member, tmp_path):
    """An adapter whose files say that its training rows had no earlier turns."""
    folder = adapter_folder(tmp_path / "single", base.fingerprint, seed=5)
    description = json.loads((folder / "adapter.json").read_text())
    description["metadata"] = {"with_history": False}
    (folder / "adapter.json").write_text(json.dumps(description))
    return registry.publish_adapter(folder, name="single", checkpoint=base, owner=member)


@pytest.fixture
def talked(conversation, base):
    """A conversation in which the base has answered "q" with "the base's"."""
    conversation.messages.create(role="user", content="q")
    conversation.messages.create(role="assistant", content="the base's", checkpoint=base)
    return conversation


def asked(answer_id) -> list[str]:
    return [turn["content"] for turn in request_for(answer_id)[0].messages]


ALONE, ALL = ["q"], ["q", "the base's", "q"]


@pytest.mark.parametrize(
    ("model", "with_history", "prompt"),
    [
        ("single", None, ALONE),
        ("single", True, ALL),
        ("tuned", None, ALL),  # imported: nobody knows
        ("tuned", False, ALONE),
        (None, None, ALL),
        (None, False, ALONE),
    ],
)
def test_rest(client, talked, adapter, single_turns, scripted, model, with_history, prompt):
    body = {"content": "q", "adapter": model, "with_history": with_history}
    url = f"/api/v1/conversations/{talked.pk}/messages/"
    answer = client.post(url, body, content_type="application/json").json()["answer"]
    assert (asked(answer["id"]), answer["with_history"]) == (prompt, prompt == ALL)


async def test_websocket(member, talked, single_turns, scripted):
    async with socket(member, talked.pk) as page:
        bad = {"type": "message.send", "content": "q", "with_history": "no"}
        await page.send_json_to(bad)
        assert (await hear(page, 1))[0]["error"]["param"] == "with_history"
        await page.send_json_to({"type": "message.send", "content": "q", "adapter": "single"})
        frames = await hear(page, 6)
    assert await database_sync_to_async(asked)(frames[0]["message"]) == ALONE


def test_page(client, member, talked, single_turns, scripted):
    client.force_login(member)
    fields = {"text": "q", "model": f"adapter-{single_turns.pk}"}
    for history, prompt in (("", ALONE), ("yes", ALL)):
        Message.objects.filter(pk__gt=talked.messages.all()[1].pk).delete()
        client.post(f"/chat/{talked.pk}/say/", fields | {"history": history})
        assert asked(Message.objects.last().pk) == prompt
    Message.objects.update(with_history=False)
    page = client.get(f"/chat/{talked.pk}/").content.decode()
    assert page.count('data-part="alone" hidden') == 1  # the template for new ones


@pytest.mark.parametrize(("with_history", "prompt"), [(None, ALL), (True, ALL), (False, ALONE)])
def test_doors_that_send_their_own_history_send_it_all_unless_they_say_otherwise(
    async_client, client, single_turns, router, with_history, prompt
):
    more = {} if with_history is None else {"with_history": with_history}
    body = {"model": "single", "prompt": "q", "history": [["q", "the base's"]]}
    assert client.post("/", body | more, content_type="application/json").status_code == 200
    system = {"role": "system", "content": "short"}
    messages = [
        system,
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "the base's"},
        {"role": "user", "content": "q"},
    ]
    body = {"model": "single", "messages": messages}
    url = "/v1/chat/completions"
    assert client.post(url, body | more, content_type="application/json").status_code == 200
    first, second = ([turn["content"] for turn in r.messages] for r in router.requests.values())
    assert (first, second) == (prompt, ["short", *prompt])
    listed = {row["id"]: row["with_history"] for row in client.get("/v1/models").json()["data"]}
    assert listed == {"base": True, "single": False}


def test_the_owner_says_how_an_imported_one_was_trained(client, member, adapter):
    client.force_login(member)
    url = f"/adapters/{adapter.pk}/"
    for answer, known in (("no", False), ("yes", True), ("", None)):
        client.post(url, {"action": "history", "history": answer})
        assert Adapter.objects.get().with_history is known
