"""A full disk and a database that is away, at every door."""

import errno
import io
import json

import pytest
from asgiref.sync import sync_to_async
from channels.testing import WebsocketCommunicator
from django.db import OperationalError, connection

from chat.conversations import turns
from chat.models import Conversation
from portal import outages
from portal.asgi import application
from portal.models import ApiKey
from tuning.datasets import files

pytestmark = pytest.mark.django_db(transaction=True)

FULL = OperationalError("database or disk is full")
LOCKED = OperationalError("database is locked")


def refusing(fault, reads=False):
    """Every write fails (and every read too), as the database itself would have it."""

    def execute(run, sql, params, many, context):
        if reads or sql.startswith(("INSERT", "UPDATE", "DELETE")):
            raise fault
        return run(sql, params, many, context)

    return connection.execute_wrapper(execute)


@pytest.fixture
def web(client, member):
    client.raise_request_exception = False
    client.force_login(member)
    return client


@pytest.fixture
def script(client, member):
    client.raise_request_exception = False
    _key, secret = ApiKey.create_for(member)
    client.defaults["HTTP_AUTHORIZATION"] = f"Bearer {secret}"
    return client


def post(client, path, body):
    return client.post(path, json.dumps(body), content_type="application/json")


def test_what_only_reads_goes_on_with_a_full_disk(script):
    with refusing(FULL):  # the key's last use cannot be noted
        for path in ("conversations", "datasets", "tuning-runs", "checkpoints"):
            assert script.get(f"/api/v1/{path}/").status_code == 200
        assert script.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [(FULL, 507, "disk_full"), (LOCKED, 503, "database_unavailable")],
)
def test_what_writes_is_told_why_and_when_to_try_again(script, fault, status, code):
    with refusing(fault):
        answer = post(script, "/api/v1/conversations/", {"title": "x"})
    assert answer.status_code == status and int(answer["Retry-After"]) > 0
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", code) and error["message"]
    assert post(script, "/api/v1/conversations/", {"title": "x"}).status_code == 201


@pytest.mark.parametrize("language", ["zh-hans", "en"])
def test_a_page_says_it_in_the_readers_language(web, language):
    with refusing(LOCKED, reads=True):
        page = web.get("/chat/", headers={"Accept-Language": language})
    assert page.status_code == 503 and page["Retry-After"]
    said = "数据库没有响应" if language == "zh-hans" else "The database does not answer"
    assert said in page.content.decode()


def test_a_full_disk_under_an_upload_is_told(web, data_dir, monkeypatch):
    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    file = io.BytesIO(b'{"prompt": "a", "response": "b"}\n')
    file.name = "rows.jsonl"
    answer = web.post("/api/v1/datasets/", {"file": file})
    assert answer.status_code == 507 and answer.json()["error"]["code"] == "disk_full"


def test_faults_of_ours_stay_faults(script):
    with refusing(OperationalError("no such table: chat_conversation")):
        answer = post(script, "/api/v1/conversations/", {"title": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")


def test_health_names_what_is_missing(client, monkeypatch):
    assert "disk_full" not in client.get("/healthz").json()["problems"]
    monkeypatch.setattr(outages, "room", lambda: 0)
    with refusing(LOCKED, reads=True):
        report = client.get("/healthz")
    assert report.status_code == 200 and report.json()["status"] == "degraded"
    assert {"disk_full", "database_unavailable"} <= set(report.json()["problems"])
    assert report.json()["queue"] is None


async def test_a_socket_says_so_and_stays_open(member, monkeypatch):
    conversation = await sync_to_async(Conversation.objects.create)(owner=member)
    _key, secret = await sync_to_async(ApiKey.create_for)(member)
    socket = WebsocketCommunicator(
        application,
        f"/ws/conversations/{conversation.pk}/",
        headers=[(b"authorization", f"Bearer {secret}".encode())],
    )
    connected, _ = await socket.connect()
    assert connected

    def full(*arguments, **named):  # the socket's thread has a connection of its own
        raise FULL

    monkeypatch.setattr(turns, "create_turn", full)
    await socket.send_json_to({"type": "message.send", "content": "hello"})
    told = await socket.receive_json_from(10)
    assert (told["type"], told["error"]["code"]) == ("error", "disk_full")
    await socket.send_json_to({"type": "nonsense"})
    assert (await socket.receive_json_from(10))["error"]["code"] == "unknown_frame"
    await socket.disconnect()
