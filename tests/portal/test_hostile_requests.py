"""Whatever a client spells, over pages and over REST: a clear refusal, never a 500."""

import base64
import json

import pytest
from channels.testing import HttpCommunicator
from django.core.asgi import get_asgi_application
from django.test import Client

from chat.models import Checkpoint, Conversation
from portal.models import ApiKey, Run
from tests.support.folders import checkpoint_folder
from tests.support.urls import routes
from tuning.models import Dataset, DatasetVersion, TuningRun

pytestmark = pytest.mark.django_db

NO_NUMBERS = ["²", "٣", "-1", "1e3", "abc", "\0", "9" * 30, "9" * 5000]


@pytest.fixture
def logged_in(client, member):
    client.force_login(member)
    client.raise_request_exception = False
    return client


@pytest.fixture
def run(member):
    version = DatasetVersion.objects.create(
        dataset=Dataset.objects.create(owner=member, name="d"),
        number=1,
        splits={"train": {"rows": 1, "sha256": "0"}},
    )
    checkpoint = Checkpoint.objects.create(name="base", path="/nowhere")
    return TuningRun.objects.create(
        owner=member,
        kind="tuning",
        name="r",
        status=Run.Status.FAILED,
        dataset_version=version,
        checkpoint=checkpoint,
        recipe={"method": "ptuning_v2"},
    )


@pytest.mark.parametrize("spelt", NO_NUMBERS)
def test_what_is_no_number_is_refused_wherever_a_number_is_read(logged_in, run, spelt):
    for path in (
        "/tuning/new/?dataset=",
        "/tuning/new/?like=",
        "/evaluations/new/?adapter=",
        "/chat/?adapter=",
    ):
        assert (
            logged_in.get(
                path[: path.index("?")], {path[path.index("?") + 1 : -1]: spelt}
            ).status_code
            == 200
        )
    assert logged_in.post("/account/", {"action": "revoke_key", "key": spelt}).status_code == 404
    assert (
        logged_in.post("/chat/start/", {"text": "x", "model": f"base-{spelt}"[:40]}).url == "/chat/"
    )
    dataset = run.dataset_version.dataset_id
    for path, name in (
        (f"tuning-runs/{run.pk}/log/", "tail"),
        (f"datasets/{dataset}/examples/", "page"),
        (f"datasets/{dataset}/examples/", "page_size"),
    ):
        answer = logged_in.get(f"/api/v1/{path}", {name: spelt})
        assert (answer.status_code, json.loads(answer.content)["error"]["param"]) == (400, name)


@pytest.mark.parametrize("number", ["0", "9" * 18, "9" * 30])
def test_an_id_that_no_row_can_have_is_404(logged_in, run, number):
    for path in (
        "/chat/",
        "/datasets/",
        "/tuning/",
        "/evaluations/",
        "/api/v1/tuning-runs/",
        "/api/v1/evaluation-runs/",
    ):
        assert logged_in.get(f"{path}{number}/").status_code == 404


@pytest.mark.parametrize(
    ("path", "name", "spelt"),
    [
        *(("conversations/", "page_size", spelt) for spelt in ("0", "-1", "x", "", "null", "1e9")),
        ("check-runs/", "status", "no-such-status"),
        ("check-runs/", "dataset", "x"),
        ("collected-examples/", "status", "no-such-status"),
        ("collected-examples/", "message", "9" * 30),
    ],
)
def test_a_list_overlooks_nothing_that_it_is_asked(logged_in, path, name, spelt):
    answer = logged_in.get(f"/api/v1/{path}", {name: spelt})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("value", [0, 1.5, True, [], {}])
def test_what_is_no_text_is_not_taken_as_one(logged_in, value):
    answer = logged_in.post("/api/v1/conversations/", {"title": value}, "application/json")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "title")


@pytest.mark.parametrize("position", ["abc", "\0", "9" * 30, "9" * 5000])
def test_a_made_up_cursor_is_404(logged_in, run, position):
    cursor = base64.b64encode(f"p={position}".encode()).decode()
    for path in ("conversations/", f"tuning-runs/{run.pk}/metrics/"):
        assert logged_in.get(f"/api/v1/{path}", {"cursor": cursor}).status_code == 404


@pytest.mark.parametrize(
    "body", ["[" * 100_000, '{"title": 1e999}', '{"title": NaN}', '{"title": ' + "9" * 5000 + "}"]
)
def test_what_no_json_is_or_holds_is_a_400(logged_in, member, body):
    key = ApiKey.create_for(member)[1]
    for path in ("/api/v1/conversations/", "/v1/chat/completions", "/"):
        answer = logged_in.post(
            path, body, "application/json", headers={"Authorization": f"Bearer {key}"}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_a_json_body_of_many_megabytes_is_refused_unread(logged_in):
    answer = logged_in.post(
        "/api/v1/conversations/", json.dumps({"title": "x" * 6_000_000}), "application/json"
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


@pytest.mark.parametrize("number", [10**400, -(10**400)])
def test_a_number_beyond_any_float_is_out_of_range_at_every_door(
    logged_in, member, tmp_path, data_dir, number, run
):
    from chat import registry

    base = registry.register_checkpoint(checkpoint_folder(tmp_path / "base"), "named")
    dataset = run.dataset_version.dataset_id
    conversation = Conversation.objects.create(owner=member)

    def refused(path, body):
        key = ApiKey.create_for(member)[1]
        answer = logged_in.post(
            path, body, "application/json", headers={"Authorization": f"Bearer {key}"}
        )
        assert answer.status_code == 400
        return {problem["param"] for problem in answer.json()["error"]["problems"]}

    said = {"model": base.name, "messages": [{"role": "user", "content": "x"}]}
    assert refused("/v1/chat/completions", {**said, "temperature": number}) == {"temperature"}
    assert refused("/", {"prompt": "x", "top_p": number}) == {"top_p"}
    send = {"content": "x", "sampling": {"temperature": number}}
    assert refused(f"/api/v1/conversations/{conversation.pk}/messages/", send) == {
        "sampling.temperature"
    }
    plan = {"dataset": dataset, "checkpoint": base.pk}
    assert refused("/api/v1/evaluation-runs/", {**plan, "max_examples": number}) == {"max_examples"}
    assert refused("/api/v1/tuning-runs/", {**plan, "max_steps": number}) == {"max_steps"}
    form = {
        "dataset": dataset,
        "checkpoint": base.pk,
        "max_steps": str(number),
        "preset": "starter",
    }
    assert logged_in.post("/tuning/new/", form).status_code == 200


@pytest.mark.parametrize(
    "path", ["/api/v1/nothing/", "/api/v1/conversations/1.5/", "/v1/nothing", "/api/nothing"]
)
def test_an_address_that_is_none_is_told_to_a_script_as_json(client, path):
    answer = client.get(path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_a_fault_of_the_portal_is_told_to_a_script_as_json(logged_in, monkeypatch):
    monkeypatch.setattr("chat.api.rest.live.discard", lambda conversation: 1 / 0)
    Conversation.objects.create(owner_id=logged_in.session["_auth_user_id"])
    answer = logged_in.delete(f"/api/v1/conversations/{Conversation.objects.get().pk}/")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")


@pytest.mark.parametrize("method", ["post", "put", "patch", "delete"])
def test_a_wrong_method_is_405_and_no_question_of_csrf(member, method):
    client = Client(
        enforce_csrf_checks=True,
        headers={"Authorization": f"Bearer {ApiKey.create_for(member)[1]}"},
    )
    for path in ("/v1/models", "/v1/models/base"):
        answer = getattr(client, method)(path)
        assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD")
        assert answer.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.django_db(transaction=True)
async def test_a_head_has_no_body_however_long_the_page():
    """A body would be read as the next response on the connection; Django's own test client hides
    it.
    """
    told = {}
    for method in ("HEAD", "GET"):
        page = HttpCommunicator(
            get_asgi_application(), method, "/api/schema/", headers=[(b"host", b"localhost")]
        )
        answer = await page.get_response(timeout=30)
        told[method] = answer["status"], len(answer["body"])
    assert told["HEAD"] == (200, 0) and told["GET"][1] > 65_536


@pytest.mark.parametrize("method", ["options", "trace", "put", "head", "propfind"])
def test_no_method_fails_at_any_url(client, logged_in, staff, method):
    paths = [route.of(1) for route in routes() if "(" not in route.path]
    assert len(paths) > 80
    anonymous, chief = Client(raise_request_exception=False), Client(raise_request_exception=False)
    chief.force_login(staff)
    for path in paths:
        for browser in (anonymous, logged_in, chief):
            answer = browser.generic(method.upper(), path)
            assert answer.status_code < 500, (path, method)


def test_what_a_page_may_load_is_said_everywhere(logged_in, client):
    for path in ("/account/", "/api/docs/", "/login/", "/chat/"):
        policy = client.get(path).headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert "no-store" in logged_in.get("/account/").headers["Cache-Control"]


def test_nobody_schedules_code_in_the_admin(client, staff):
    client.force_login(staff)
    for page in ("schedule/add/", "schedule/", "ormq/"):
        assert client.get(f"/admin/django_q/{page}").status_code == 404
