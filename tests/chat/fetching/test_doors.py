"""Downloads and the inventory through pages and REST."""

import json
import os
import time

import pytest
from django.test import Client

from chat.fetching.plan import endpoints
from chat.inventory import home, incoming
from chat.models import Adapter, Checkpoint, Conversation, FetchRun
from chat.registry import make_default, publish_adapter, register_checkpoint
from portal.models import ApiKey, Run
from portal.runs import lifecycle
from tests.support.folders import adapter_folder, checkpoint_folder
from tests.support.page_rows import text_of

pytestmark = pytest.mark.django_db


@pytest.fixture
def chief(staff, client):
    client.force_login(staff)
    return client


@pytest.fixture
def api(staff):
    return Client(headers={"Authorization": f"Bearer {ApiKey.create_for(staff)[1]}"})


def post(api, body, path="/api/v1/fetch-runs/"):
    return api.post(path, json.dumps(body), content_type="application/json")


def test_a_download_over_rest(hub, api, member):
    made = post(api, {"source": "hf:org/name", "default": True})
    assert made.status_code == 201
    told = made.json()
    assert (told["status"], told["source"], told["files"]) == ("queued", "hf:org/name", [])
    again = post(api, {"source": "hf:org/name"})
    assert again.status_code == 200 and again.json()["id"] == told["id"]
    path = f"/api/v1/fetch-runs/{told['id']}/"
    FetchRun.objects.filter(pk=told["id"]).update(
        status="running",
        progress=1,
        total=4,
        transfer={
            "files": [{"name": "a", "size": 4096, "done": 1024}],
            "done": 1024,
            "total": 4096,
            "bytes_per_second": 512.0,
            "seconds_left": 6.0,
        },
    )
    told = api.get(path).json()
    assert told["files"] == [{"name": "a", "bytes": 4096, "done": 1024}]
    assert (told["progress"], told["bytes_total"], told["eta_seconds"]) == (0.25, 4096, 6.0)
    assert api.post(f"{path}cancel/").status_code == 200
    assert api.post(f"{path}resume/").status_code == 409
    assert api.get(f"{path}log/").status_code == 200
    theirs = Client(headers={"Authorization": f"Bearer {ApiKey.create_for(member)[1]}"})
    assert theirs.get(path).status_code == 404
    assert post(theirs, {"source": "hf:org/name"}).status_code == 403


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "source", "required"),
        ({"source": "smollm3"}, "source", "unknown_model"),
        ({"source": "hf:justaname"}, "source", "bad_repository"),
        ({"source": "/does/not/exist"}, "source", "path_missing"),
        ({"source": "gemma-3-270m"}, "accept_licence", "terms"),
        ({"source": "hf:org/name", "name": "a:b"}, "name", "invalid_name"),
    ],
)
@pytest.mark.parametrize("language", ["en", "zh-hans"])
def test_bad_wishes_are_refused_in_both_languages(hub, api, body, param, code, language):
    api.defaults["HTTP_ACCEPT_LANGUAGE"] = language
    refused = post(api, body)
    error = refused.json()["error"]
    assert refused.status_code == 400 and (error["param"], error["code"]) == (param, code)
    chinese = any("\u4e00" <= character <= "\u9fff" for character in error["message"])
    assert chinese == (language == "zh-hans")
    assert not FetchRun.objects.exists()


def test_the_card_starts_a_download_and_terms_must_be_accepted(chief, data_dir):
    page = text_of(chief.get("/checkpoints/new/"))
    assert "SmolLM2-135M-Instruct" in page and "Apache-2.0" in page
    assert "https://ai.google.dev/gemma/terms" in page and "hf-mirror.com" in page
    refused = chief.post("/checkpoints/fetch/", {"source": "gemma-3-270m"}, follow=True)
    assert "https://ai.google.dev/gemma/terms" in text_of(refused)
    assert not FetchRun.objects.exists()
    wish = {"source": "gemma-3-270m", "accept_licence": "on"}
    started = chief.post("/checkpoints/fetch/", wish, follow=True)
    run = FetchRun.objects.get()
    assert started.redirect_chain[-1][0] == f"/downloads/{run.pk}/"
    assert run.recipe["accept_licence"] is True and run.queue == "default"
    again = chief.post("/checkpoints/fetch/", wish, follow=True)
    assert again.redirect_chain[-1][0] == f"/downloads/{run.pk}/"
    assert f"/downloads/{run.pk}/" in text_of(chief.get("/checkpoints/new/"))
    assert f"/downloads/{run.pk}/" in text_of(chief.get("/tasks/"))
    chief.post(f"/downloads/{run.pk}/cancel/")
    run.refresh_from_db()
    assert run.status == Run.Status.CANCELLED
    chief.post(f"/downloads/{run.pk}/resume/")
    run.refresh_from_db()
    assert run.status == Run.Status.QUEUED


def test_a_failed_download_is_explained(chief, staff, data_dir):
    run = FetchRun.objects.create(owner=staff, kind="fetch", name="x", source="hf:a/b", recipe={})
    lifecycle.fail(run.pk, lifecycle.claim(run.pk), "gated", "the original words")
    page = text_of(chief.get(f"/downloads/{run.pk}/", headers={"accept-language": "en"}))
    assert "accept them there and set HF_TOKEN" in page and "the original words" in page
    assert "Go on" in page


def test_members_look_and_staff_act(member, client, data_dir, tmp_path):
    kept = register_checkpoint(checkpoint_folder(tmp_path / "kept"))
    client.force_login(member)
    assert client.get("/checkpoints/").status_code == 200
    page = text_of(client.get(f"/checkpoints/{kept.pk}/"))
    assert "Qwen2ForCausalLM" in page and "1,024 × 2 B" in page  # parameters × bytes
    for path in ("fetch/", "endpoints/", "orphans/delete/", f"{kept.pk}/change/"):
        assert client.post(f"/checkpoints/{path}", {"action": "delete"}).status_code == 403
    assert client.get("/downloads/999/").status_code == 404


def test_addresses_of_hubs_are_set_on_the_page(chief, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://own.example/")
    assert endpoints("hf")[0] == "https://own.example"
    wish = {"hf": "https://a.example\r\n http://b.example:1/ ", "modelscope": ""}
    chief.post("/checkpoints/endpoints/", wish)
    assert endpoints("hf") == ["https://a.example", "http://b.example:1"]
    assert endpoints("modelscope") == ["https://modelscope.cn"]
    for bad in ("ftp://x", "javascript:alert(1)", "http://", "x" * 400, "https://a " * 11):
        chief.post("/checkpoints/endpoints/", {"hf": bad})
        assert endpoints("hf") == ["https://a.example", "http://b.example:1"]


@pytest.fixture
def fetched(data_dir):
    """A default checkpoint, and another in the portal's own folder."""
    make_default(register_checkpoint(checkpoint_folder(data_dir / "elsewhere", seed=1), "first"))
    return register_checkpoint(checkpoint_folder(home() / "fetched"), "fetched")


def test_deleting_takes_the_folder_of_what_was_fetched_alone(chief, api, fetched, member, tmp_path):
    adapter = publish_adapter(
        adapter_folder(tmp_path / "a", fetched.fingerprint),
        name="tuned",
        checkpoint=fetched,
        owner=member,
    )
    Conversation.objects.create(owner=member, checkpoint=fetched)
    page = text_of(chief.get("/checkpoints/", headers={"accept-language": "en"}))
    assert "1 tuned model" in page and "1 conversation" in page
    assert "Its tuned models would be deleted with it." in page
    first = Checkpoint.objects.get(name="first")
    assert api.delete(f"/api/v1/checkpoints/{first.pk}/").status_code == 409
    assert api.delete(f"/api/v1/checkpoints/{fetched.pk}/").status_code == 204
    assert not os.path.exists(fetched.path) and not adapter.path.exists()
    assert Conversation.objects.get().checkpoint is None
    register_checkpoint(checkpoint_folder(tmp_path / "theirs", seed=2), "theirs")
    theirs = Checkpoint.objects.get(name="theirs")
    chief.post(f"/checkpoints/{theirs.pk}/change/", {"action": "delete"})
    assert os.path.exists(theirs.path) and not Checkpoint.objects.filter(name="theirs").exists()


def test_runs_hold_their_base(chief, api, fetched, member, dataset_version):
    from tuning.models import TuningRun

    TuningRun.objects.create(
        owner=member,
        kind="tuning",
        name="r",
        recipe={},
        dataset_version=dataset_version,
        checkpoint=fetched,
    )
    refused = api.delete(f"/api/v1/checkpoints/{fetched.pk}/")
    assert refused.status_code == 409 and os.path.exists(fetched.path)
    assert refused.json()["error"]["code"] == "checkpoint_in_use"


@pytest.fixture
def dataset_version(member, data_dir):
    from tests.support.page_rows import json_lines
    from tuning.datasets import store

    rows = [{"content": "q", "summary": "a"}]
    return store.ingest(json_lines(rows), name="ads", owner=member).current


def test_left_over_folders_are_listed_and_deleted(chief, fetched, data_dir):
    old = time.time() - 7200
    for path in (home() / "lost", incoming() / "abc", data_dir / "adapters" / "lost"):
        path.mkdir(parents=True)
        (path / "file").write_bytes(b"x" * 5000)
        os.utime(path, (old, old))
    page = text_of(chief.get("/checkpoints/"))
    for key in ("checkpoints/lost", "checkpoints/.incoming/abc", "adapters/lost"):
        assert key in page
        chief.post("/checkpoints/orphans/delete/", {"key": key})
        assert not (data_dir / key).exists()
    for key in ("checkpoints/fetched", "../..", "", "checkpoints/.incoming", "portal.sqlite3"):
        chief.post("/checkpoints/orphans/delete/", {"key": key})
    assert os.path.exists(fetched.path) and not Adapter.objects.exists()


def test_memory_over_rest(api, fetched):
    told = api.get(f"/api/v1/checkpoints/{fetched.pk}/memory/").json()
    assert {(one["use"], one["precision"]) for one in told} >= {
        ("chat", "int4"),
        ("full", "float32"),
    }
    assert all(one["bytes"] == sum(term["bytes"] for term in one["terms"]) for one in told)
