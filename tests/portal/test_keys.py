"""What a key is good for, how often and how long: the same at every door."""

import io
import json
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
from asgiref.sync import sync_to_async
from channels.routing import URLRouter
from channels.testing import WebsocketCommunicator
from django.core.cache import cache
from django.core.management import call_command
from django.db import DatabaseError
from django.test import Client
from django.utils import timezone

from chat import registry
from chat.api.routing import websocket_urlpatterns
from chat.conversations.frames import LiveAnswer
from chat.conversations.messages import save_end
from chat.models import Conversation, Message
from portal.models import ApiKey
from tests.chat.api.conftest import router  # noqa: F401 - a worker that is scripted
from tests.support.folders import checkpoint_folder

pytestmark = pytest.mark.django_db
DOORS = {
    "chat": ["/api/v1/conversations/", "/api/v1/checkpoints/", "/api/v1/adapters/", "/v1/models"],
    "data": ["/api/v1/datasets/"],
    "tuning": ["/api/v1/tuning-runs/", "/api/v1/evaluation-runs/"],
    "admin": ["/api/v1/fetch-runs/"],
}


@pytest.fixture(autouse=True)
def nothing_counted():
    cache.clear()


@pytest.fixture
def base(tmp_path, data_dir):
    return registry.register_checkpoint(checkpoint_folder(tmp_path / "base"), "base")


def client_of(user, **limits) -> Client:
    _key, secret = ApiKey.create_for(user, **limits)
    return Client(headers={"Authorization": f"Bearer {secret}"})


def said(client, path="/v1/chat/completions"):
    messages = [{"role": "user", "content": "x"}]
    body = {"prompt": "x"} if path == "/" else {"model": "base", "messages": messages}
    return client.post(path, json.dumps(body), "application/json")


@pytest.mark.parametrize("scope", list(DOORS))
def test_a_key_opens_the_doors_of_its_scope_alone(member, scope):
    client = client_of(member, scopes=[scope])
    for other, paths in DOORS.items():
        for path in paths:
            answer = client.get(path)
            if other == scope:
                assert answer.status_code == 200, path
            else:
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (403, "insufficient_scope"), path
                assert error["type"] == "permission_error"


def test_what_anybody_may_read_a_key_may_read_too(member):
    for scope in DOORS:
        client = client_of(member, scopes=[scope])
        for path in ("/api/schema/", "/api/docs/", "/healthz"):
            assert client.get(path).status_code == 200, path
        assert client.post("/api/schema/").status_code == 405


def test_without_the_admin_scope_a_chiefs_key_is_a_members(staff, member, tmp_path):
    plain, chief = client_of(staff, scopes=["chat", "data", "tuning"]), client_of(staff)
    body = json.dumps({"path": str(tmp_path)})
    assert plain.post("/api/v1/checkpoints/", body, "application/json").status_code == 403
    assert chief.post("/api/v1/checkpoints/", body, "application/json").status_code == 400
    staff.refresh_from_db()
    assert staff.is_staff


def test_an_expired_key_opens_nothing(member):
    client = client_of(member, expires_at=timezone.now() - timedelta(seconds=1))
    assert client.get("/v1/models").status_code == 401
    assert client.get("/api/v1/datasets/").status_code == 401


def test_requests_of_a_minute_are_counted_over_all_doors(member, base, router):  # noqa: F811
    client = client_of(member, requests_per_minute=4)
    for path in ("/v1/models", "/api/v1/datasets/", "/api/v1/conversations/"):
        assert client.get(path).status_code == 200
    assert said(client, "/").status_code == 200
    for refused in (client.get("/v1/models"), client.get("/api/v1/datasets/"), said(client, "/")):
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (429, "rate_limit_exceeded")
        assert error["type"] == "rate_limit_error" and 0 < int(refused["Retry-After"]) <= 60
    assert client_of(member).get("/v1/models").status_code == 200  # another key


@pytest.mark.django_db(transaction=True)
def test_the_tokens_of_a_day_are_counted_over_all_doors(member, base, router):  # noqa: F811
    client = client_of(member, tokens_per_day=20)
    key = ApiKey.objects.get()
    assert said(client).status_code == 200  # 5 tokens of prompt, 2 of answer
    key.refresh_from_db()
    assert key.tokens_used == 7
    assert said(client, "/").status_code == 200
    answer = Message.objects.create(
        conversation=Conversation.objects.create(owner=member),
        role="assistant", status="streaming", api_key=key,
    )  # fmt: skip
    ended = LiveAnswer(answer.pk, "x", status="complete", usage={"total_tokens": 9})
    save_end(ended)
    save_end(ended)  # another web process, which follows it too
    key.refresh_from_db()
    assert key.tokens_used == 23
    refused = said(client)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    assert client.get("/api/v1/datasets/").status_code == 200
    ApiKey.objects.update(tokens_day=timezone.localdate() - timedelta(days=1))
    assert said(client).status_code == 200


@asynccontextmanager
async def socket(user, conversation_id):
    path = f"/ws/conversations/{conversation_id}/"
    page = WebsocketCommunicator(URLRouter(websocket_urlpatterns), path)
    page.scope["user"] = user
    await page.connect()
    try:
        yield page
    finally:
        await page.disconnect()


@pytest.mark.django_db(transaction=True)
async def test_the_socket_asks_the_same(member):
    conversation = await Conversation.objects.acreate(owner=member)
    for limits, code in (
        ({"requests_per_minute": 0}, "rate_limit_exceeded"),
        ({"tokens_per_day": 0}, "insufficient_quota"),
    ):
        _key, secret = await sync_to_async(ApiKey.create_for)(member, **limits)
        user = await sync_to_async(ApiKey.user_of)(secret)
        async with socket(user, conversation.pk) as page:
            await page.send_json_to({"type": "message.send", "content": "x"})
            assert (await page.receive_json_from(5))["error"]["code"] == code
    _key, secret = await sync_to_async(ApiKey.create_for)(member, scopes=["data"])
    user = await sync_to_async(ApiKey.user_of)(secret)
    async with socket(user, conversation.pk) as page:  # it could read
        assert (await page.receive_output(5))["code"] == 4403


def test_a_use_that_cannot_be_noted_refuses_nobody(member, monkeypatch):
    client = client_of(member)

    def locked(*_arguments, **_fields):
        raise DatabaseError("database is locked")

    monkeypatch.setattr(ApiKey.objects.get_queryset().__class__, "update", locked)
    assert client.get("/v1/models").status_code == 200


def test_the_account_page_makes_a_key_with_limits_and_shows_them(client, member):
    client.force_login(member)
    form = {
        "action": "create_key", "name": "notebook", "scopes": ["chat", "data"], "days": "30",
        "requests_per_minute": "60", "tokens_per_day": "5000",
    }  # fmt: skip
    page = client.post("/account/", form, headers={"Accept-Language": "en"}).content.decode()
    key = ApiKey.objects.get()
    assert (key.scopes, key.requests_per_minute, key.tokens_per_day) == (["chat", "data"], 60, 5000)
    assert timedelta(29) < key.expires_at - timezone.now() <= timedelta(30)
    assert "chat · datasets · 60 requests a minute · 5000 tokens a day" in page
    client.post("/account/", {"action": "create_key", "name": "plain"})
    assert ApiKey.objects.get(name="plain").scopes == list(ApiKey.Scope)


def test_the_command_makes_a_key_with_limits_and_prints_it_alone(member):
    out = io.StringIO()
    call_command(
        "create_api_key", "member", "--scopes", "chat", "--days", "7", "--tokens-per-day", "9",
        stdout=out,
    )  # fmt: skip
    key = ApiKey.objects.get()
    assert out.getvalue().strip().startswith("sk-") and len(out.getvalue().split()) == 1
    assert (key.scopes, key.tokens_per_day) == (["chat"], 9) and key.expires_at
