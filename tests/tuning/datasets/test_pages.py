"""Uploads, their problems, rows and versions."""

import io

import pytest

from portal.models import Run
from tests.support.page_fixtures import *  # noqa: F403  this page's rows
from tests.support.page_rows import json_lines, text_of
from tuning.models import Dataset

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_worker")]


def test_an_upload_is_checked_stored_and_shown(client, member, data_dir):
    client.force_login(member)
    file = json_lines(
        [{"content": "<b>裤</b>", "summary": "好看"}, {"content": "裙", "summary": ""}],
        "my ads.jsonl",
    )
    response = client.post("/datasets/upload/", {"file": file, "name": ""}, follow=True)
    found = Dataset.objects.get()
    page = text_of(response)
    assert (found.name, found.owner, found.prompt_column) == ("my ads", member, "content")
    assert "&lt;b&gt;裤&lt;/b&gt;" in page and "<b>裤</b>" not in page
    assert found.problems[0]["line"] == 2 and str(found.problems[0]["message"]) in page


def test_the_uploading_script_is_told_where_the_dataset_is(client, member, data_dir):
    client.force_login(member)
    fields = {"file": json_lines([{"content": "a", "summary": "b"}])}
    response = client.post("/datasets/upload/", fields, headers={"Accept": "application/json"})
    assert (response.status_code, response.json()) == (
        201,
        {"url": f"/datasets/{Dataset.objects.get().pk}/"},
    )


def test_a_bad_upload_names_the_lines_and_stores_nothing(client, member, data_dir):
    client.force_login(member)
    file = io.BytesIO(
        b'{"content": "a", "summary": "b"}\nnot json\n{"content": 1, "summary": "b"}\n'
    )
    file.name = "bad.json"
    response = client.post(
        "/datasets/upload/",
        {"file": file, "name": "x", "prompt_column": "content", "response_column": "summary"},
    )
    assert response.status_code == 422
    assert [kind["lines"] for kind in response.context["kinds"]] == [[2], [3]]
    assert 'value="content"' in text_of(response)  # the form is kept
    assert not Dataset.objects.exists() and not list((data_dir / "datasets").glob("*.jsonl"))


def test_columns_are_suggested_from_the_head_of_a_file_cut_anywhere(client, member, data_dir):
    client.force_login(member)
    head = json_lines([{"prompt": "问", "response": "答"}] * 3).getvalue()[:-7]
    file = io.BytesIO(head)
    file.name = "x.json"
    found = client.post("/datasets/columns/", {"file": file}).json()
    assert (found["prompt_column"], found["response_column"]) == ("prompt", "response")
    empty = io.BytesIO(b"\n")
    empty.name = "x.json"
    refused = client.post("/datasets/columns/", {"file": empty})
    assert refused.status_code == 400 and refused.json()["problem"]
    broken = io.BytesIO(b"\nhello\n")
    broken.name = "x.json"
    client.cookies["django_language"] = "en"
    told = client.post("/datasets/columns/", {"file": broken}).json()["problem"]
    assert told == "Line 2: This line is not JSON (at character 1)."


def test_rows_are_paged_and_validation_rows_set_aside(client, member, dataset):
    client.force_login(member)
    page = client.get(f"/datasets/{dataset.pk}/?page=3")
    assert [row["prompt"] for row in page.context["rows"]] == [f"问{row}" for row in range(40, 50)]
    refused = client.post(f"/datasets/{dataset.pk}/split/", {"validation": 50, "seed": 1})
    assert refused.status_code == 422 and refused.context["split_form"].errors["validation"]
    client.post(f"/datasets/{dataset.pk}/split/", {"validation": 10, "seed": 1})
    page = client.get(f"/datasets/{dataset.pk}/?split=validation")
    assert len(page.context["rows"]) == 10 and not page.context["can_split"]


def test_every_door_tells_the_same_count_of_problems_however_many_and_after_a_split(
    client, member, data_dir
):
    client.force_login(member)
    rows = [{"content": f"问{row}", "summary": ""} for row in range(1100)]
    rows += [{"content": f"裙{row}", "summary": "答"} for row in range(4)]
    client.post("/datasets/upload/", {"file": json_lines(rows), "name": "many"})
    dataset = Dataset.objects.get()
    client.cookies["django_language"] = "en"
    for _before_and_after_the_split in range(2):
        assert client.get(f"/api/v1/datasets/{dataset.pk}/").json()["problem_count"] == 1100
        for page in (f"/datasets/{dataset.pk}/", "/datasets/"):
            assert "1100 notes" in text_of(client.get(page)), page
        client.post(f"/datasets/{dataset.pk}/split/", {"validation": 1, "seed": 1})
    assert dataset.versions.count() == 2


def test_a_dataset_in_use_is_not_deleted(client, member, dataset, tuning_run):
    client.force_login(member)
    response = client.post(f"/datasets/{dataset.pk}/delete/", follow=True)
    assert 'role="alert"' in text_of(response) and Dataset.objects.filter(deleted_at=None).exists()
    Run.objects.update(status=Run.Status.SUCCEEDED)
    client.post(f"/datasets/{dataset.pk}/delete/")
    assert client.get(f"/datasets/{dataset.pk}/").status_code == 404
