"""/api/v1/ as scripts use it: checkpoints, adapters, conversations, messages and their streams."""

import asyncio
import io
import json
import zipfile

import numpy as np
import pytest
from django.test import Client
from django.utils import timezone
from safetensors.numpy import load, load_file

from chat.api.adapter_export import Download, downloads
from chat.engine.request import RequestRefused
from chat.models import Adapter, Checkpoint, Conversation, Message
from chat.worker.router import WorkerUnavailable
from portal import logins
from portal.models import ApiKey
from tests.support.folders import HEAD_DIM, KV_HEADS, LAYERS, PRE_SEQ_LEN, checkpoint_folder

pytestmark = pytest.mark.django_db
JSON = "application/json"


def frames_of(response) -> list[tuple[dict, dict]]:
    """[(fields, data)] of an event stream."""
    found = []
    for block in response.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((fields, json.loads(fields["data"])))
    return found


async def read(response) -> str:
    return "".join([part.decode() async for part in response.streaming_content])


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_are_listed_in_pages(client, base):
    body = client.get("/api/v1/checkpoints/").json()
    assert set(body) == {"next", "previous", "results"}
    (found,) = body["results"]
    assert (found["id"], found["name"], found["is_default"]) == (base.pk, "base", True)
    assert found["description"]["layers"] == LAYERS and "path" not in found
    assert client.get(f"/api/v1/checkpoints/{base.pk}/").json() == found


def test_only_staff_register_a_checkpoint(client, staff, tmp_path, base):
    folder = checkpoint_folder(tmp_path / "new", seed=1)
    assert client.post("/api/v1/checkpoints/", {"path": str(folder)}, JSON).status_code == 403
    client.force_login(staff)
    client.defaults.pop("HTTP_AUTHORIZATION")
    created = client.post("/api/v1/checkpoints/", {"path": str(folder), "name": "new model"}, JSON)
    assert created.status_code == 201 and created.json()["name"] == "new model"
    refused = client.post("/api/v1/checkpoints/", {"path": str(tmp_path)}, JSON)
    assert refused.status_code == 400
    assert (
        refused.json()["error"]["code"] == "config_missing"
        and refused.json()["error"]["param"] == "path"
    )
    assert Checkpoint.objects.count() == 2


# ---------------------------------------------------------------- adapters


def test_an_adapter_as_documented(client, adapter, base):
    (found,) = client.get("/api/v1/adapters/").json()["results"]
    assert {
        name: found[name]
        for name in ("id", "name", "checkpoint", "pre_seq_len", "step", "tuning_run")
    } == {
        "id": adapter.pk,
        "name": "tuned",
        "checkpoint": base.pk,
        "pre_seq_len": PRE_SEQ_LEN,
        "step": 7,
        "tuning_run": None,
    }
    assert found["sha256"] == adapter.sha256


def test_the_owner_renames_shares_and_deletes_an_adapter(client, other_client, adapter):
    path = f"/api/v1/adapters/{adapter.pk}/"
    assert client.patch(path, {"name": "base"}, JSON).json()["error"]["code"] == "name_taken"
    assert client.patch(path, {"name": "a:b"}, JSON).json()["error"]["param"] == "name"
    assert (
        client.patch(path, {"name": "tuned", "shared": True, "sha256": "x"}, JSON).status_code
        == 200
    )
    # seen, but not theirs
    assert other_client.patch(path, {"name": "stolen"}, JSON).status_code == 403
    assert other_client.delete(path).status_code == 403
    adapter.refresh_from_db()
    assert (adapter.name, adapter.shared, len(adapter.sha256)) == ("tuned", True, 64)
    assert client.delete(path).status_code == 204
    assert not Adapter.objects.exists() and not adapter.path.exists()


def test_a_download_holds_the_prefix_in_both_formats(client, adapter):
    response = client.get(f"/api/v1/adapters/{adapter.pk}/download/")
    assert response["Content-Type"] == "application/zip"
    assert response["Content-Disposition"] == 'attachment; filename="tuned.zip"'
    archive = zipfile.ZipFile(io.BytesIO(b"".join(response.streaming_content)))
    prefix = load_file(adapter.path / "adapter.safetensors")["prefix"]
    assert np.array_equal(load(archive.read("adapter.safetensors"))["prefix"], prefix)
    rows = load(archive.read("peft/adapter_model.safetensors"))["prompt_embeddings"]
    back = rows.reshape(PRE_SEQ_LEN, LAYERS, 2, KV_HEADS, HEAD_DIM).transpose(1, 2, 3, 0, 4)
    assert np.array_equal(back, prefix)
    config = json.loads(archive.read("peft/adapter_config.json"))
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PREFIX_TUNING", PRE_SEQ_LEN)


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 100])
def test_a_download_of_missing_or_damaged_files_is_a_clear_404(client, adapter, content):
    weights = adapter.path / "adapter.safetensors"
    weights.unlink() if content is None else weights.write_bytes(content)
    response = client.get(f"/api/v1/adapters/{adapter.pk}/download/")
    assert response.status_code == 404 and response.json()["error"]["code"] == "files_missing"


# ---------------------------------------------------------------- conversations and messages


def test_a_conversation_is_made_renamed_and_deleted(client, member):
    created = client.post("/api/v1/conversations/", {"title": ""}, JSON)
    assert created.status_code == 201
    path = f"/api/v1/conversations/{created.json()['id']}/"
    assert client.patch(path, {"title": "new"}, JSON).json()["title"] == "new"
    assert client.patch(path, {"title": "x" * 200}, JSON).status_code == 400
    assert Conversation.objects.get().owner == member
    assert client.delete(path).status_code == 204 and client.get(path).status_code == 404


def test_a_message_gives_its_pending_answer(client, conversation, adapter, scripted):
    path = f"/api/v1/conversations/{conversation.pk}/messages/"
    sent = client.post(
        path,
        {
            "content": "你好",
            "adapter": adapter.pk,
            "sampling": {"do_sample": False, "prefix_strength": 1.5},
        },
        JSON,
    )
    assert sent.status_code == 202
    message, answer = sent.json()["message"], sent.json()["answer"]
    assert (message["role"], message["content"], message["status"]) == ("user", "你好", "complete")
    assert (answer["role"], answer["status"], answer["adapter"]) == (
        "assistant",
        "queued",
        adapter.pk,
    )
    assert (answer["model"], answer["sampling"]) == (
        "base:tuned",
        {"do_sample": False, "prefix_strength": 1.5},
    )
    assert [started.pk for started in scripted.started] == [answer["id"]]
    listed = client.get(path).json()["results"]
    assert [row["id"] for row in listed] == [message["id"], answer["id"]]
    assert client.get(f"/api/v1/messages/{answer['id']}/").json() == answer


def test_an_absent_adapter_is_the_last_one_and_null_is_none(
    client, conversation, adapter, scripted
):
    path = f"/api/v1/conversations/{conversation.pk}/messages/"
    used = []
    for choice in ({"adapter": "tuned"}, {}, {"adapter": None}, {}):
        used.append(client.post(path, {"content": "x", **choice}, JSON).json()["answer"]["adapter"])
        Message.objects.filter(status="queued").update(status="complete")
    assert used == [adapter.pk, adapter.pk, None, None]


def test_a_bad_message_names_every_problem(client, conversation, base, scripted):
    path = f"/api/v1/conversations/{conversation.pk}/messages/"
    body = {"content": " ", "adapter": "none", "sampling": {"top_p": 7, "prefix_strength": -1}}
    error = client.post(path, body, JSON)
    assert error.status_code == 400
    assert {p["param"] for p in error.json()["error"]["problems"]} == {
        "content",
        "adapter",
        "sampling.top_p",
        "sampling.prefix_strength",
    }
    for nonsense in ("[1]", '"x"', "nonsense"):
        assert client.post(path, nonsense, JSON).status_code == 400
    assert not scripted.started


def test_a_second_message_is_a_conflict(client, conversation, answer, scripted):
    response = client.post(
        f"/api/v1/conversations/{conversation.pk}/messages/", {"content": "x"}, JSON
    )
    assert response.status_code == 409 and response.json()["error"]["code"] == "answer_in_flight"


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (WorkerUnavailable("down"), 503, "worker_unavailable"),
        (RequestRefused("queue_full", "full", retry_after=9), 503, "queue_full"),
        (
            RequestRefused("context_length_exceeded", "too long", param="messages"),
            400,
            "context_length_exceeded",
        ),
    ],
)
def test_a_worker_that_does_not_take_it_is_told(
    client, conversation, base, scripted, failure, status, code
):
    scripted.failure = failure
    response = client.post(
        f"/api/v1/conversations/{conversation.pk}/messages/", {"content": "x"}, JSON
    )
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert ("Retry-After" in response) == (status == 503)
    assert conversation.messages.last().status == "failed"  # the row explains itself


# ---------------------------------------------------------------- streams


@pytest.mark.django_db(transaction=True)
async def test_a_stream_numbers_its_frames_and_ends_with_the_terminal_one(
    async_client, answer, scripted
):
    response = await async_client.get(f"/api/v1/messages/{answer.pk}/stream/")
    assert response.status_code == 200 and response["Content-Type"].startswith("text/event-stream")
    frames = frames_of(await read(response))
    assert [int(fields["id"]) for fields, _data in frames] == [1, 2, 3, 4, 5, 6]
    assert [fields["event"] for fields, _data in frames][-1] == "message.finished"
    assert "".join(data.get("text", "") for _fields, data in frames) == "你好，**世界**"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("query", "headers"),
    [("?after=4", {}), ("", {"Last-Event-ID": "4"}), ("?after=4", {"Last-Event-ID": "1"})],
)
async def test_a_stream_goes_on_where_the_reader_left(
    async_client, answer, scripted, query, headers
):
    response = await async_client.get(
        f"/api/v1/messages/{answer.pk}/stream/{query}", headers=headers
    )
    assert [int(fields["id"]) for fields, _data in frames_of(await read(response))] == [5, 6]


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "9" * 30])
def test_a_number_that_is_none_is_a_400(client, answer, scripted, after):
    assert client.get(f"/api/v1/messages/{answer.pk}/stream/?after={after}").status_code == 400


@pytest.mark.django_db(transaction=True)
async def test_a_silent_stream_says_that_it_is_still_there_and_lets_go_when_left(
    async_client, answer, scripted, monkeypatch
):
    monkeypatch.setattr("chat.api.sse.KEEPALIVE", 0.01)
    scripted.hold = True
    response = await async_client.get(
        f"/api/v1/messages/{answer.pk}/stream/?after=5", headers={"Accept": "text/event-stream"}
    )
    heard = []

    async def listen():
        async for part in response:
            heard.append(part)

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0.2)
    listener.cancel()  # as the server does it when the client is gone
    await asyncio.gather(listener, return_exceptions=True)
    assert heard[0] == b": still here\n\n" and scripted.left == [answer.pk]


def test_a_question_has_no_stream(client, conversation, answer, scripted):
    question = conversation.messages.first()
    assert client.get(f"/api/v1/messages/{question.pk}/stream/").status_code == 404


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_text_that_no_database_takes_is_a_400(client, conversation, adapter, scripted, text):
    for path, body in (
        (f"conversations/{conversation.pk}/", {"title": text}),
        (f"adapters/{adapter.pk}/", {"name": text}),
    ):
        assert client.patch(f"/api/v1/{path}", json.dumps(body), JSON).status_code == 400
    path = f"/api/v1/conversations/{conversation.pk}/messages/"
    for wrong in (
        {"content": text},
        {"adapter": text},
        {"checkpoint": text},
        {"sampling": {text: 1}},
        {"sampling": text},
    ):
        body = {"content": "x", **wrong}
        assert client.post(path, json.dumps(body), JSON).status_code == 400


def test_stop_ends_it_and_stopping_twice_changes_nothing(client, answer, scripted):
    for _time in range(2):
        response = client.post(f"/api/v1/messages/{answer.pk}/stop/")
        assert response.status_code == 202 and response.json()["status"] == "stopped"
    assert scripted.stopped == [answer.pk]


def test_a_cookie_needs_the_csrf_token_and_a_key_does_not(client, key, member, base):
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(member)
    assert browser.post("/api/v1/conversations/", {"title": "x"}, JSON).status_code == 403
    assert browser.get("/api/v1/conversations/").status_code == 200
    script = Client(enforce_csrf_checks=True, headers={"Authorization": f"Bearer {key}"})
    assert script.post("/api/v1/conversations/", {"title": "x"}, JSON).status_code == 201


@pytest.mark.django_db(transaction=True)
async def test_a_stream_ends_when_its_key_is_revoked(async_client, answer, scripted, monkeypatch):
    monkeypatch.setattr(logins, "LOOK_EVERY", 0.02)
    scripted.hold = True
    response = await async_client.get(f"/api/v1/messages/{answer.pk}/stream/")
    chunks = aiter(response.streaming_content)
    heard = [await anext(chunks) for _frame in range(5)]
    await ApiKey.objects.aupdate(revoked_at=timezone.now())
    async with asyncio.timeout(5):
        assert len(heard) == 5 and not [chunk async for chunk in chunks]
    assert scripted.left == [answer.pk]


def test_downloads_of_one_user_are_bounded_and_give_their_place_back(client, adapter):
    path = f"/api/v1/adapters/{adapter.pk}/download/"
    open_ = [client.get(path) for _download in range(downloads.most)]
    refused = client.get(path)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many")
    assert refused["Retry-After"]
    for each in open_:
        each.close()
    assert client.get(path).status_code == 200
    assert client.head(path).status_code == 200


async def test_a_download_is_read_piece_by_piece(tmp_path):
    """Django would make a list of all of it before the first byte goes out."""
    (tmp_path / "large").write_bytes(b"x" * 1_000_000)
    ended = []
    file = (tmp_path / "large").open("rb")
    response = Download(file, "x.zip", lambda: ended.append(1))
    pieces = aiter(response)
    assert len(await anext(pieces)) < 100_000 and response.file_to_stream.tell() < 100_000
    response.close()
    assert ended == [1]


def test_a_messages_thoughts_come_apart(client, answer):
    answer.content = "<think>\nhm\n</think>\n\nyes"
    answer.save()
    message = client.get(f"/api/v1/messages/{answer.pk}/").json()
    assert (message["thoughts"], message["answer"]) == ("hm", "yes")
    assert message["content"] == answer.content
