"""Datasets over REST: the doors that scripts hold."""

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.utils import translation
from rest_framework.test import APIClient

from portal.models import ApiKey, Run
from tests.support.uploads import lines, rows
from tests.tuning.datasets.test_datasets import a_run
from tuning.datasets.store import ingest
from tuning.models import Dataset

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]
URL = "/api/v1/datasets/"


def client_of(user) -> APIClient:
    client = APIClient()
    client.credentials(
        HTTP_AUTHORIZATION=f"Bearer {ApiKey.create_for(user)[1]}", HTTP_ACCEPT_LANGUAGE="en"
    )
    return client


@pytest.fixture
def client(member):
    return client_of(member)


def send(client, content: bytes, name="rows.json", **fields):
    return client.post(
        URL,
        {"file": SimpleUploadedFile(name, content), "name": "mine", **fields},
        format="multipart",
    )


def test_upload_list_read_rename_delete(client, member):
    made = send(client, lines(*rows(120)), prompt_column="content", response_column="summary")
    assert made.status_code == 201
    body = made.json()
    assert (body["status"], body["rows"], body["problems"], body["splits"]) == (
        "ready",
        120,
        [],
        {"train": 120},
    )
    assert [row["id"] for row in client.get(URL).json()["results"]] == [body["id"]]
    detail = f"{URL}{body['id']}/"
    page = client.get(f"{detail}examples/?page=3").json()
    assert (page["count"], len(page["results"]), page["next"]) == (120, 20, None)
    assert page["results"][0]["line"] == 101 and "page=2" in page["previous"]
    changed = client.patch(detail, {"name": "renamed", "status": "failed"}, format="json").json()
    assert (changed["name"], changed["status"]) == ("renamed", "ready")
    split = client.post(f"{detail}split/", {"validation": 20, "seed": 1}, format="json")
    assert split.status_code == 201 and split.json()["splits"] == {"train": 100, "validation": 20}
    assert client.get(f"{detail}examples/?split=validation").json()["count"] == 20
    assert client.delete(detail).status_code == 204 and client.get(detail).status_code == 404


def test_a_bad_file_is_refused_with_every_problem(client, data_dir):
    content = lines(*rows(1)) + b"{oops\n" + lines({"content": "only"})
    answer = send(client, content)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["code"], error["param"], error["problem_count"]) == ("not_json", "file", 2)
    assert [(found["line"], found["code"]) for found in error["problems"]] == [
        (2, "not_json"),
        (3, "missing_column"),
    ]
    assert error["message"].startswith("Line 2: ")
    assert not Dataset.objects.exists() and not list((data_dir / "datasets").glob("*.jsonl"))
    taken = send(client, content, skip_bad_rows="true").json()
    assert taken["rows"] == 1 and taken["problem_count"] == 2


def test_messages_are_in_the_asked_language(client):
    with translation.override("en"):
        english = send(client, b"{oops\n", prompt_column="a", response_column="b").json()["error"][
            "message"
        ]
    assert english == "Line 1: This line is not JSON (at character 2)."


def test_bad_requests_name_the_field(client, member):
    missing = client.post(URL, {"name": "x"}, format="multipart")
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "file"
    assert client.post(URL, {"name": "x"}, format="json").status_code == 415
    dataset = ingest(SimpleUploadedFile("a.json", lines(*rows(3))), name="x", owner=member)
    detail = f"{URL}{dataset.pk}/"
    for query, status in {
        "page=0": 400,
        "page=x": 400,
        "page=9": 404,
        "split=nope": 400,
        "page_size=-1": 400,
    }.items():
        assert client.get(f"{detail}examples/?{query}").status_code == status, query
    for body in (
        {},
        {"validation": 0},
        {"validation": 2.5},
        {"validation": 3},
        {"validation": "many"},
    ):
        answer = client.post(f"{detail}split/", body, format="json")
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "validation", body


def test_a_file_above_the_limit_is_refused_unread(client, settings):
    settings.DATASET_MAX_BYTES = 1 << 20
    answer = send(client, b" " * (3 << 20))
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large"
    # slips under the form's own room, not under the file's limit
    answer = send(client, b" " * ((1 << 20) + 500_000))
    assert (
        answer.status_code == 413 and answer.json()["error"]["problems"][0]["code"] == "too_large"
    )


def test_a_dataset_in_use_is_not_deleted(client, member):
    dataset = ingest(SimpleUploadedFile("a.json", lines(*rows(3))), name="x", owner=member)
    a_run(dataset, member, Run.Status.QUEUED)
    answer = client.delete(f"{URL}{dataset.pk}/")
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "in_use"


def test_other_peoples_datasets_do_not_exist(client, member, other_member, staff):
    theirs = ingest(SimpleUploadedFile("a.json", lines(*rows(3))), name="x", owner=other_member)
    shared = ingest(SimpleUploadedFile("a.json", lines(*rows(3))), name="sample", owner=None)
    detail = f"{URL}{theirs.pk}/"
    for answer in (
        client.get(detail),
        client.get(f"{detail}examples/"),
        client.patch(detail, {"name": "y"}, format="json"),
        client.post(f"{detail}split/", {"validation": 1}, format="json"),
        client.delete(detail),
    ):
        assert answer.status_code == 404
    detail = f"{URL}{shared.pk}/"  # the portal's own: to be seen, not to be changed
    assert client.get(f"{detail}examples/").status_code == 200
    for answer in (
        client.patch(detail, {"name": "y"}, format="json"),
        client.delete(detail),
        client.post(f"{detail}split/", {"validation": 1}, format="json"),
    ):
        assert answer.status_code == 403
    assert {row["id"] for row in client.get(URL).json()["results"]} == {shared.pk}
    assert client_of(staff).get(f"{URL}{theirs.pk}/").status_code == 200
    renamed = client_of(staff).patch(detail, {"name": "y"}, format="json").json()
    assert (renamed["name"], renamed["owner"]) == ("y", None)
    assert APIClient().get(URL).status_code == 401


def test_files_that_are_gone_are_told_on_the_page_and_over_rest(client, member, data_dir):
    body = send(client, lines(*rows(20)), prompt_column="content", response_column="summary").json()
    for path in (data_dir / "datasets").glob("*.jsonl"):
        path.unlink()
    detail = f"{URL}{body['id']}/"
    for answer in (
        client.get(f"{detail}examples/"),
        client.post(f"{detail}split/", {"validation": 5}, format="json"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "files_missing")
    page = APIClient()
    page.force_login(member)
    shown = page.get(f"/datasets/{body['id']}/", headers={"accept-language": "en"})
    assert shown.status_code == 200 and "missing in the data folder" in shown.content.decode()
