"""Who may do what, over every door of chat: without a key 401, somebody else's object 404."""

import base64
import json

import pytest
from channels.testing import HttpCommunicator
from django.core.asgi import get_asgi_application
from django.test import AsyncClient, Client

from portal.logs import LineFormatter

pytestmark = pytest.mark.django_db(transaction=True)
JSON = "application/json"

NEEDS_KEY = [
    ("get", "/api/v1/checkpoints/"),
    ("post", "/api/v1/checkpoints/"),
    ("get", "/api/v1/adapters/"),
    ("get", "/api/v1/conversations/"),
    ("post", "/api/v1/conversations/"),
    ("post", "/v1/batches"),
    ("get", "/v1/batches/batch_1"),
    ("get", "/api/v1/messages/1/"),
    ("get", "/api/v1/messages/1/stream/"),
    ("post", "/api/v1/messages/1/stop/"),
    ("post", "/v1/chat/completions"),
    ("get", "/v1/models"),
    ("get", "/v1/models/base"),
    ("post", "/"),
]


@pytest.mark.parametrize(("method", "path"), NEEDS_KEY)
@pytest.mark.parametrize(
    "header",
    [
        {},
        {"Authorization": "Bearer sk-wrong"},
        {"Authorization": "Basic eDp5"},
        {"Authorization": "Bearer"},
        {"Authorization": "sk-without-a-scheme"},
        {"Authorization": "Bearer " + "键".encode().decode("latin-1")},
        {"X-Api-Key": "sk-wrong"},
    ],
)
async def test_without_a_key_it_is_401(base, method, path, header):
    response = await getattr(AsyncClient(), method)(path, headers=header)
    assert response.status_code == 401
    error = response.json()["error"]
    assert error["message"] and response["WWW-Authenticate"] == "Bearer"
    if path == "/" or path.startswith("/v1/"):
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        unknown = header.get("Authorization", "").startswith("Bearer ")
        assert ("Bearer KEY" in error["message"]) != unknown


async def test_a_key_in_the_address_is_taken_where_a_setting_says_so(base, key, router, settings):
    """As clients send http://:KEY@host."""
    body = {"prompt": "x", "model": "base", "messages": [{"role": "user", "content": "x"}]}
    for userinfo in (f":{key}", f"{key}:", f"api:{key}"):
        header = {"Authorization": "Basic " + base64.b64encode(userinfo.encode()).decode()}
        for path in ("/", "/v1/chat/completions"):
            settings.KEY_IN_ADDRESS = False
            assert (await AsyncClient().post(path, body, JSON, headers=header)).status_code == 401
            settings.KEY_IN_ADDRESS = True
            assert (await AsyncClient().post(path, body, JSON, headers=header)).status_code == 200
    for broken in ("Basic ???", "Basic", "Basic " + base64.b64encode(b":sk-wrong").decode()):
        header = {"Authorization": broken}
        assert (await AsyncClient().post("/", body, JSON, headers=header)).status_code == 401


async def test_a_key_in_the_path_is_taken_where_a_setting_says_so(
    base, key, router, settings, caplog
):
    """By POST / alone, and it stands in no log."""
    body = {"prompt": "x"}
    for path in (f"/key/{key}/", f"/key/{key}"):
        settings.KEY_IN_ADDRESS = False
        assert (await AsyncClient().post(path, body, JSON)).status_code == 404
        settings.KEY_IN_ADDRESS = True
        assert (await AsyncClient().post(path, body, JSON)).json()["response"] == "你好"
        assert (await AsyncClient().get(path)).status_code == 405
    assert (await AsyncClient().post("/key/sk-wrong/", body, JSON)).status_code == 401
    assert (await AsyncClient().get(f"/key/{key}/v1/models")).status_code == 404
    written = "\n".join(map(LineFormatter("%(message)s").format, caplog.records))
    assert "/key/sk-***" in written and key not in written


async def test_a_login_cookie_does_not_open_the_doors_without_csrf_protection(member, base, router):
    browser = AsyncClient()
    await browser.aforce_login(member)
    for path in ("/v1/chat/completions", "/"):
        assert (await browser.post(path, {"prompt": "x"}, JSON)).status_code == 401


def test_somebody_elses_objects_do_not_exist(
    other_client, staff, conversation, answer, adapter, scripted
):
    paths = [
        ("get", f"/api/v1/adapters/{adapter.pk}/"),
        ("get", f"/api/v1/adapters/{adapter.pk}/download/"),
        ("patch", f"/api/v1/adapters/{adapter.pk}/"),
        ("delete", f"/api/v1/adapters/{adapter.pk}/"),
        ("get", f"/api/v1/conversations/{conversation.pk}/"),
        ("patch", f"/api/v1/conversations/{conversation.pk}/"),
        ("delete", f"/api/v1/conversations/{conversation.pk}/"),
        ("get", f"/api/v1/conversations/{conversation.pk}/messages/"),
        ("post", f"/api/v1/conversations/{conversation.pk}/messages/"),
        ("get", f"/api/v1/messages/{answer.pk}/"),
        ("get", f"/api/v1/messages/{answer.pk}/stream/"),
        ("post", f"/api/v1/messages/{answer.pk}/stop/"),
    ]
    chief = Client()
    chief.force_login(staff)
    for method, path in paths:
        assert getattr(other_client, method)(path, content_type=JSON).status_code == 404, path
        if "adapters" not in path:  # conversations are private, from staff too
            assert getattr(chief, method)(path, content_type=JSON).status_code == 404, path
    for path in ("adapters", "conversations"):
        assert other_client.get(f"/api/v1/{path}/").json()["results"] == []
    assert not scripted.stopped and not scripted.started


async def test_somebody_elses_adapter_is_no_model(other_key, adapter, router):
    client = AsyncClient()
    header = {"Authorization": f"Bearer {other_key}"}
    body = {"messages": [{"role": "user", "content": "x"}], "prompt": "x"}
    for model in ("tuned", "base:tuned"):
        for path in ("/v1/chat/completions", "/"):
            assert (
                await client.post(path, {**body, "model": model}, JSON, headers=header)
            ).status_code == 404
        assert (await client.get(f"/v1/models/{model}", headers=header)).status_code == 404
    models = (await client.get("/v1/models", headers=header)).json()["data"]
    assert [model["id"] for model in models] == ["base"]


def test_a_revoked_key_and_a_closed_account_are_401(client, key, member, base):
    from portal.models import ApiKey

    assert client.get("/api/v1/checkpoints/").status_code == 200
    ApiKey.objects.update(revoked_at="2026-01-01T00:00Z")
    assert client.get("/api/v1/checkpoints/").status_code == 401
    ApiKey.objects.update(revoked_at=None)
    member.is_active = False
    member.save()
    assert client.get("/api/v1/checkpoints/").status_code == 401


@pytest.mark.parametrize("number", ["0", "-1", "99999999999999999999", "x", "1.5", "%00"])
def test_ids_that_are_none_are_404(client, base, number):
    for path in (
        "checkpoints",
        "adapters",
        "conversations",
        "messages",
        "datasets",
        "tuning-runs",
        "evaluation-runs",
    ):
        assert client.get(f"/api/v1/{path}/{number}/").status_code == 404


def test_a_path_with_the_wrong_end_leads_to_the_right_one_method_and_body_kept(client, base):
    response = client.post("/api/v1/conversations?x=1", {"title": "kept"}, JSON, follow=True)
    assert response.redirect_chain == [("/api/v1/conversations/?x=1", 308)]
    assert (response.status_code, response.json()["title"]) == (201, "kept")
    assert client.get("/v1/models/", follow=True).json()["data"][0]["id"] == "base"


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/api/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/chat/completions/", "/v1/chat/completions"),
        ("/openai/v1/models", "/v1/models"),
        ("/models", "/v1/models"),
        ("/v1/audio/speech", "chat/completions"),
        ("/v1/embeddings", "chat/completions"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_wrong_base_address_is_told_the_right_one(path, named, method):
    """Straight into the application: test clients and browsers rewrite such paths."""
    asked = HttpCommunicator(
        get_asgi_application(), method, path, headers=[(b"host", b"localhost")]
    )
    answer = await asked.get_response(timeout=30)
    error = json.loads(answer["body"])["error"]
    assert (answer["status"], error["code"], named in error["message"]) == (404, "not_found", True)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/"])
@pytest.mark.parametrize(
    ("allowed", "everybody", "origin", "answered"),
    [
        ([], False, "https://app.example", None),
        (["https://app.example"], False, "https://app.example", "https://app.example"),
        (["https://app.example"], False, "https://other.example", None),
        ([], True, "https://other.example", "*"),
    ],
)
async def test_a_page_of_another_origin_gets_in_where_a_setting_says_so(
    settings, path, allowed, everybody, origin, answered
):
    settings.CORS_ALLOWED_ORIGINS, settings.CORS_ALLOW_ALL_ORIGINS = allowed, everybody
    preflight = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    response = await AsyncClient().options(path, headers=preflight)
    assert response.get("Access-Control-Allow-Origin") == answered
    assert "Access-Control-Allow-Credentials" not in response
    if answered:
        assert response.status_code == 200
        assert "authorization" in response["Access-Control-Allow-Headers"]
    refused = await AsyncClient().post(path, {}, JSON, headers={"Origin": origin})
    if path != "/v1/models":
        assert refused.status_code == 401, "a page is told why, too"
    assert refused.get("Access-Control-Allow-Origin") == answered
    assert (await AsyncClient().get("/account/", headers={"Origin": origin})).get(
        "Access-Control-Allow-Origin"
    ) is None


@pytest.mark.parametrize(
    "path", ["/api/v1/", "/api/v1/nothing/", "/api", "/v1", "/v1/embeddings", "/v1/embeddings/"]
)
@pytest.mark.parametrize("method", ["get", "post", "delete"])
def test_what_is_no_interface_is_a_404_that_scripts_can_read(method, path):
    response = getattr(Client(enforce_csrf_checks=True), method)(path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["/stream", "/generate/", "/openai/v2/x", "/chat/9999999/none"])
async def test_an_address_that_nothing_is_at_answers_a_program_in_json(async_client, path):
    """Every wrong address, not only those that end as one of ours."""
    key = {"Authorization": "Bearer sk-none"}
    answer = await async_client.post(path, {"prompt": "x"}, "application/json", headers=key)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"
