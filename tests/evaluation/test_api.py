"""Evaluations over REST and in the admin, on runs that have ended."""

import json

import pytest
from django.urls import reverse
from rest_framework.test import APIClient

from chat.models import Adapter, Checkpoint
from evaluation.comparison import update_differences
from evaluation.intervals import METRICS, average
from evaluation.models import EvaluationRun, Prediction
from evaluation.plan import create_evaluation
from portal.models import ApiKey, Run
from tests.support.uploads import lines, rows, upload
from tuning.datasets.store import ingest

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]
URL = "/api/v1/evaluation-runs/"


@pytest.fixture
def checkpoint():
    return Checkpoint.objects.create(name="base", path="x", fingerprint="y")


@pytest.fixture
def adapter(checkpoint, member):
    return Adapter.objects.create(
        name="tuned", checkpoint=checkpoint, owner=member, folder="a", sha256="b", pre_seq_len=8
    )


@pytest.fixture
def dataset(member, data_dir):
    return ingest(upload(lines(*rows(30))), name="wares", owner=member)


def client_of(user) -> APIClient:
    client = APIClient()
    client.credentials(
        HTTP_AUTHORIZATION=f"Bearer {ApiKey.create_for(user)[1]}", HTTP_ACCEPT_LANGUAGE="en"
    )
    return client


@pytest.fixture
def client(member):
    return client_of(member)


def ended(run: EvaluationRun, gain: float) -> EvaluationRun:
    """As evaluation/work.py leaves a run."""
    made = [
        Prediction(
            run=run,
            row=row,
            prompt=f"问{row}",
            reference=f"参考{row}",
            text=f" 预测{row}<b>",
            scores={metric: 40 + row % 7 + gain for metric in METRICS},
        )
        for row in range(run.recipe["rows"])
    ]
    Prediction.objects.bulk_create(made)
    scores = average([prediction.scores for prediction in made])
    run.__class__.objects.filter(pk=run.pk).update(
        scores=scores, status=Run.Status.SUCCEEDED, progress=len(made)
    )
    update_differences(run.pk)
    run.refresh_from_db()
    return run


@pytest.fixture
def tuned(member, dataset, checkpoint, adapter):
    run = create_evaluation(member, dataset=dataset, checkpoint=checkpoint, adapter=adapter)
    ended(run.baseline, 0)
    return ended(run, 5)


def test_create_and_read(client, dataset, checkpoint, adapter):
    body = {
        "dataset": dataset.pk,
        "checkpoint": checkpoint.pk,
        "adapter": adapter.pk,
        "max_examples": 12,
    }
    made = client.post(URL, body, format="json")
    assert made.status_code == 201
    run = made.json()
    assert (run["status"], run["rows"], run["adapter"], run["decoding"], run["scores"]) == (
        "queued",
        12,
        adapter.pk,
        "greedy",
        None,
    )
    assert [row["id"] for row in client.get(URL).json()["results"]] == [run["id"], run["baseline"]]
    assert client.get(f"{URL}{run['baseline']}/").json()["adapter"] is None
    cancelled = client.post(f"{URL}{run['id']}/cancel/").json()
    assert cancelled["status"] == "cancelled"
    assert client.post(f"{URL}{run['id']}/resume/").json()["status"] == "queued"
    assert client.post(f"{URL}{run['id']}/resume/").status_code == 409


def test_every_problem_of_a_bad_body_at_once(client, dataset, checkpoint, other_member):
    answer = client.post(URL, {"dataset": "x", "max_examples": "y"}, format="json")
    assert answer.status_code == 400
    assert {problem["param"] for problem in answer.json()["error"]["problems"]} == {
        "dataset",
        "checkpoint",
        "max_examples",
    }
    body = {
        "dataset": dataset.pk,
        "checkpoint": checkpoint.pk,
        "decoding": "beam",
        "max_examples": 0,
    }
    answer = client.post(URL, body, format="json")
    assert {problem["param"] for problem in answer.json()["error"]["problems"]} == {
        "decoding",
        "max_examples",
    }
    theirs = ingest(upload(lines(*rows(3))), name="theirs", owner=other_member)
    answer = client.post(URL, {"dataset": theirs.pk, "checkpoint": checkpoint.pk}, format="json")
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "does_not_exist"
    assert client.post(URL, {"dataset": 10**30, "checkpoint": 1}, format="json").status_code == 400
    assert not EvaluationRun.objects.exists()


def test_scores_predictions_comparison_and_files(client, tuned):
    detail = f"{URL}{tuned.pk}/"
    run = client.get(detail).json()
    assert set(run["scores"]) == set(METRICS) and run["status"] == "succeeded"
    assert run["scores"]["bleu-4"]["value"] - run["baseline_scores"]["bleu-4"][
        "value"
    ] == pytest.approx(5)
    gain = run["difference"]["bleu-4"]
    assert {name: gain[name] for name in ("value", "low", "high")} == {
        "value": 5.0,
        "low": 5.0,
        "high": 5.0,
    }
    assert gain["p"] < 0.01
    page = client.get(f"{detail}predictions/?page_size=20").json()
    assert [row["row"] for row in page["results"]] == list(range(20))
    following = client.get(page["next"]).json()
    assert [row["row"] for row in following["results"]] == list(range(20, 30)) and following[
        "next"
    ] is None
    assert set(page["results"][0]) == {"row", "prompt", "reference", "prediction", "scores"}
    compared = client.get(f"{detail}compare/?with={tuned.baseline_id}").json()
    assert compared["rows"] == 30 and compared["difference"]["rouge-l"]["value"] == 5.0
    assert client.get(f"{detail}compare/").status_code == 400
    for other, http_status in [(9999, 404), ("9" * 20, 400), ("²", 400)]:
        assert client.get(f"{detail}compare/?with={other}").status_code == http_status
    lines_ = client.get(f"{detail}generated_predictions.txt/", headers={"accept": "text/plain"})
    assert "attachment" in lines_["Content-Disposition"]
    assert lines_.content.decode().splitlines()[1] == '{"labels": "参考1", "predict": "预测1<b>"}'
    results = json.loads(client.get(f"{detail}predict_results.json/").content)
    assert list(results)[:4] == [
        "predict_bleu-4",
        "predict_rouge-1",
        "predict_rouge-2",
        "predict_rouge-l",
    ]
    assert (
        results["predict_samples"] == 30
        and results["predict_rouge-l"] == run["scores"]["rouge-l"]["value"]
    )


def test_what_is_not_there_yet_is_said(client, member, dataset, checkpoint, tuned):
    other = create_evaluation(member, dataset=dataset, checkpoint=checkpoint, max_examples=2)
    detail = f"{URL}{other.pk}/"
    assert client.get(f"{detail}predict_results.json/").status_code == 409
    assert client.get(f"{detail}generated_predictions.txt/").json()["error"]["code"] == "no_scores"
    assert (
        client.get(f"{URL}{tuned.pk}/compare/?with={other.pk}").json()["error"]["code"]
        == "no_scores"
    )
    elsewhere = ingest(upload(lines(*rows(5, 50))), name="x", owner=member)
    other = ended(create_evaluation(member, dataset=elsewhere, checkpoint=checkpoint), 0)
    answer = client.get(f"{URL}{tuned.pk}/compare/?with={other.pk}")
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "different_rows"


def test_other_peoples_evaluations_do_not_exist(tuned, other_member, staff):
    stranger = client_of(other_member)
    for path in (
        "",
        "predictions/",
        "predict_results.json/",
        "generated_predictions.txt/",
        "compare/?with=1",
    ):
        assert stranger.get(f"{URL}{tuned.pk}/{path}").status_code == 404, path
    for verb in ("cancel", "resume"):
        assert stranger.post(f"{URL}{tuned.pk}/{verb}/").status_code == 404
    assert stranger.get(URL).json()["results"] == []
    assert client_of(staff).get(f"{URL}{tuned.pk}/").status_code == 200
    assert APIClient().get(f"{URL}{tuned.pk}/").status_code == 401


def test_a_deleted_adapter_leaves_its_name_on_the_scores(client, tuned, adapter):
    adapter.delete()
    run = client.get(f"{URL}{tuned.pk}/").json()
    assert (run["adapter"], run["adapter_name"]) == (None, "tuned") and run["scores"]


def test_the_admin_shows_base_beside_tuned(
    admin_client, tuned, settings, django_assert_max_num_queries
):
    # nothing is collected in the tests
    plain = {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}
    settings.STORAGES = {**settings.STORAGES, "staticfiles": plain}
    with django_assert_max_num_queries(14):
        page = admin_client.get(
            reverse("admin:evaluation_evaluationrun_changelist")
        ).content.decode()
    base, ours = (f"{run.scores['rouge-l']['value']:.2f}" for run in (tuned.baseline, tuned))
    assert f"{base} → <strong>{ours}</strong>" in page and "+5.00 [+5.00, +5.00]" in page
    assert (
        "wares v1" in page
        and "#predictions" in page
        and f"tuned<br><small>{tuned.checkpoint.name}" in page
    )
    address = reverse("admin:evaluation_evaluationrun_change", args=[tuned.pk])
    page = admin_client.get(address).content.decode()
    assert "预测3&lt;b&gt;" in page and "<b>" not in page and "预测25" not in page
    assert "预测25" in admin_client.get(f"{address}?page=2").content.decode()
    assert 'name="_save"' not in page  # to look at, not to edit
    assert "max_target_length: " in page  # the recipe, one line a value


def test_a_review_over_rest_is_a_reviewers(client, tuned, staff):
    address = f"{URL}{tuned.pk}/review/"
    assert client.post(address, {"decision": "approved"}, format="json").status_code == 403
    reviewer = client_of(staff)
    for body in ({"decision": "rejected"}, {"decision": "maybe"}, {}):
        refused = reviewer.post(address, body, format="json")
        assert refused.status_code == 400 and refused.json()["error"]["message"]
    told = reviewer.post(address, {"decision": "approved", "note": "好"}, format="json").json()
    assert (told["review"], told["review_note"]) == ("approved", "好")
    assert client_of(staff).post(f"{URL}99999/review/", {}, format="json").status_code == 404
