"""/api/v1/tuning-runs/ and the admin's lists, as a client sees them."""

import json
import re

import pytest

from portal.runs import lifecycle
from tuning.models import Dataset, TuningMetric, TuningRun
from tuning.plan import create_run

URL = "/api/v1/tuning-runs/"


@pytest.fixture
def api(client, member):
    client.force_login(member)
    return client


@pytest.fixture
def run(member, checkpoint, make_dataset):
    return create_run(
        member, dataset=make_dataset(member), checkpoint=checkpoint, name="first", max_steps=20
    )


def post(client, url, body=None):
    return client.post(url, json.dumps(body or {}), content_type="application/json")


def test_create_then_read(api, member, checkpoint, make_dataset):
    dataset = make_dataset(member)
    answer = post(
        api,
        URL,
        {
            "dataset": dataset.pk,
            "checkpoint": checkpoint.pk,
            "method": "ptuning_v2",
            "name": "v1",
            "max_steps": 30,
            "pre_seq_len": 16,
            "learning_rate": 0.01,
            "prefix_projection": True,
            "quantization_bit": None,
            "seed": 5,
        },
    )
    assert answer.status_code == 201, answer.content
    created = answer.json()
    assert created["status"] == "queued" and created["queue_position"] == 0
    assert (created["step"], created["max_steps"], created["progress"], created["adapter"]) == (
        0,
        30,
        0.0,
        None,
    )
    assert (
        created["recipe"]["learning_rate"] == 0.01
        and created["recipe"]["prefix_projection"] is True
    )
    detail = api.get(f"{URL}{created['id']}/").json()
    assert detail == created and detail["dataset"] == dataset.pk and detail["owner"] == "member"
    assert [row["id"] for row in api.get(URL).json()["results"]] == [created["id"]]
    assert api.get(f"{URL}?status=running").json()["results"] == []
    assert api.get(f"{URL}?status=asleep").status_code == 400


def test_a_member_with_enough_runs_waiting_is_told_so_at_every_door(api, run, settings):
    settings.QUEUED_RUNS = 1
    body = {"dataset": run.dataset_version.dataset_id, "checkpoint": run.checkpoint_id}
    answer = post(api, URL, body)
    assert answer.status_code == 429
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_queued")
    assert post(api, "/api/v1/evaluation-runs/", body).status_code == 429
    page = api.get("/tuning/new/")
    form = page.context["form"]
    values = {name: form[name].value() for name in form.fields} | body
    values = {
        name: value for name, value in values.items() if value is not None and value is not False
    }
    refused = api.post("/tuning/new/", values)
    assert refused.status_code == 200 and error["message"] in refused.content.decode()
    assert TuningRun.objects.count() == 1
    lifecycle.cancel(run)
    assert post(api, URL, body).status_code == 201
    assert post(api, f"{URL}{run.pk}/resume/").status_code == 429


def test_all_problems_of_a_body_at_once(api, checkpoint, make_dataset, other_member):
    body = {
        "dataset": make_dataset(other_member).pk,
        "checkpoint": 999,
        "pre_seq_len": 0,
        "learning_rate": "fast",
        "max_steps": 10**9,
        "quantization_bit": 3,
        "lr_scheduler_type": "saw",
        "learning_rat": 1,
    }
    answer = post(api, URL, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    assert {problem["param"] for problem in error["problems"]} == set(body)


@pytest.mark.parametrize(
    "body", [{}, [], "text", {"dataset": None}, {"dataset": {"id": 1}}, {"dataset": 10**30}]
)
def test_a_body_of_another_shape_is_a_400(api, body):
    assert api.post(URL, json.dumps(body), content_type="application/json").status_code == 400


def test_a_length_that_does_not_fit_is_told_with_the_numbers(api, member, checkpoint, make_dataset):
    body = {
        "dataset": make_dataset(member).pk,
        "checkpoint": checkpoint.pk,
        "max_source_length": 500,
    }
    error = post(api, URL, body).json()["error"]
    assert (
        error["param"] == "max_source_length"
        and error["code"] == "does_not_fit"
        and "512" in error["message"]
    )


def test_others_runs_do_not_exist(client, other_member, run):
    client.force_login(other_member)
    for path in ("", "metrics/", "log/"):
        assert client.get(f"{URL}{run.pk}/{path}").status_code == 404
    for verb in ("cancel/", "resume/"):
        assert post(client, f"{URL}{run.pk}/{verb}").status_code == 404
    assert client.get(URL).json()["results"] == []
    client.logout()
    assert client.get(URL).status_code == 401 and post(client, URL).status_code == 401


def test_cancel_and_resume(api, run):
    assert post(api, f"{URL}{run.pk}/resume/").status_code == 409
    assert post(api, f"{URL}{run.pk}/cancel/").json()["status"] == "cancelled"
    assert post(api, f"{URL}{run.pk}/cancel/").json()["status"] == "cancelled"
    assert post(api, f"{URL}{run.pk}/resume/").json()["status"] == "queued"
    token = lifecycle.claim(run.pk)
    assert post(api, f"{URL}{run.pk}/cancel/").json()["status"] == "running"
    assert lifecycle.heartbeat(run.pk, token) is lifecycle.Signal.CANCEL


def test_metrics_and_progress_of_a_running_run(api, run):
    token = lifecycle.claim(run.pk)
    lifecycle.heartbeat(run.pk, token, progress=10, phase="training")
    TuningRun.objects.filter(pk=run.pk).update(loss=2.5, samples_per_second=32.0)
    for step in (10, 5):
        TuningMetric.objects.create(
            run=run, step=step, loss=3.0, learning_rate=0.1, samples_per_second=32.0
        )
    detail = api.get(f"{URL}{run.pk}/").json()
    assert (detail["step"], detail["progress"], detail["loss"]) == (10, 0.5, 2.5)
    assert detail["eta_seconds"] == pytest.approx(10 * 16 / 32.0)
    assert [point["step"] for point in api.get(f"{URL}{run.pk}/metrics/").json()["results"]] == [
        5,
        10,
    ]


def test_the_log_and_its_tail(api, run):
    url = f"{URL}{run.pk}/log/"
    assert api.get(url).content == b""
    run.folder.mkdir(parents=True)
    run.log_path.write_text("one\n二\nthree\n", encoding="utf-8")
    answer = api.get(url, {"tail": 2}, headers={"accept": "text/plain"})
    assert (
        answer["Content-Type"] == "text/plain; charset=utf-8"
        and answer.content.decode() == "二\nthree\n"
    )
    assert api.get(url).content.decode() == "one\n二\nthree\n"
    for tail in ("0", "-1", "x", "٣", "9" * 30):
        refused = api.get(url, {"tail": tail}, headers={"accept": "text/plain"})
        assert (refused.status_code, refused["Content-Type"]) == (400, "application/json")


def test_a_list_costs_the_same_queries_however_long(
    api, member, checkpoint, make_dataset, django_assert_max_num_queries
):
    dataset = make_dataset(member)
    for _ in range(6):
        run = create_run(member, dataset=dataset, checkpoint=checkpoint)
        lifecycle.cancel(run)
    with django_assert_max_num_queries(6):
        assert len(api.get(URL).json()["results"]) == 6


def test_the_admin_lists_cancels_and_resumes(client, staff, run, settings):
    # nothing has been collected here
    plain = {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}
    settings.STORAGES = {**settings.STORAGES, "staticfiles": plain}
    client.force_login(staff)
    page = client.get("/admin/tuning/tuningrun/").content.decode()
    assert "first" in page and "0 / 20" in page
    type(run).objects.filter(pk=run.pk).update(
        error={"code": "out_of_memory", "message": "<too little>"}
    )
    page = client.get(f"/admin/tuning/tuningrun/{run.pk}/change/").content.decode()
    assert "out_of_memory: &lt;too little&gt;" in page and "<br>max_steps: " in page
    assert client.get("/admin/tuning/tuningrun/add/").status_code == 403
    for action, status in (("cancel", "cancelled"), ("resume", "queued")):
        client.post("/admin/tuning/tuningrun/", {"action": action, "_selected_action": [run.pk]})
        run.refresh_from_db()
        assert run.status == status
    page = client.get("/admin/tuning/dataset/").content.decode()
    assert "ads" in page
    Dataset.objects.update(
        problems=[{"line": 7, "code": "x", "message": "<odd>", "level": "warning"}]
    )
    page = client.get(
        f"/admin/tuning/dataset/{run.dataset_version.dataset_id}/change/"
    ).content.decode()
    assert "7: &lt;odd&gt;" in page and re.search(r"train \d", page)
