"""Tuning runs and evaluations: forms, live pages, scores."""

import pytest

from chat.models import Checkpoint
from evaluation.models import METRICS, EvaluationRun, Prediction
from evaluation.views import marked
from portal.models import Run
from tests.portal.pages.made import text_of
from tuning.models import Dataset, TuningMetric, TuningRun

pytestmark = pytest.mark.django_db


# ---- tuning


def filled(client, path="/tuning/new/", **changes) -> dict:
    """What a browser would send: the form's own values with `changes`."""
    form = client.get(path).context["form"]
    values = {name: form[name].value() for name in form.fields}
    values["dataset"], values["checkpoint"] = (
        Dataset.objects.first().pk,
        Checkpoint.objects.first().pk,
    )
    return {
        name: value
        for name, value in {**values, **changes}.items()
        if value is not None and value is not False
    }


def test_the_preset_of_the_checkpoint_starts_a_run_as_it_stands(
    client, member, dataset, checkpoint
):
    client.force_login(member)
    response = client.post("/tuning/new/", filled(client, name="first"))
    run = TuningRun.objects.get()
    assert response["Location"] == f"/tuning/{run.pk}/"
    assert (run.name, run.owner, run.status) == ("first", member, Run.Status.QUEUED)
    assert run.recipe["preset"] == "starter" and run.recipe["max_steps"] == run.total


def test_every_wrong_value_is_said_at_its_field_and_nothing_starts(
    client, member, dataset, checkpoint
):
    client.force_login(member)
    wrong = filled(client, pre_seq_len="0", learning_rate="fast", max_steps="-3", dataset="999")
    form = client.post("/tuning/new/", wrong).context["form"]
    assert {"learning_rate", "dataset"} <= set(form.errors)
    wrong = filled(client, pre_seq_len="0", max_steps="-3")
    response = client.post("/tuning/new/", wrong)
    assert {"pre_seq_len", "max_steps"} <= set(response.context["form"].errors)
    assert 'value="-3"' in text_of(response)  # what was typed is kept
    assert not TuningRun.objects.exists()


def test_a_new_run_like_an_earlier_one_has_its_recipe(client, member, tuning_run):
    client.force_login(member)
    form = client.get(f"/tuning/new/?like={tuning_run.pk}").context["form"]
    assert (form["pre_seq_len"].value(), form["max_steps"].value()) == (8, 100)


def test_a_running_run_shows_its_curve_and_refreshes_an_ended_one_does_not(
    client, member, tuning_run
):
    client.force_login(member)
    path = f"/tuning/{tuning_run.pk}/"
    response = client.get(path)
    assert response.context["chart"]["points"][-1] == (20, 3.0)
    assert "data-live-every" in text_of(response)
    assert "<dd>auto</dd>" not in text_of(response)  # the form calls it automatic
    Run.objects.update(
        status=Run.Status.FAILED, error={"code": "nan_loss", "message": "The loss is not a number."}
    )
    page = text_of(client.get(path))
    assert "The loss is not a number." in page and "data-live-every" not in page


def test_a_long_run_is_thinned_to_what_a_chart_can_show(client, member, tuning_run):
    points = [
        TuningMetric(run=tuning_run, step=step, loss=1.0, learning_rate=0.1)
        for step in range(21, 3001)
    ]
    TuningMetric.objects.bulk_create(points)
    client.force_login(member)
    shown = client.get(f"/tuning/{tuning_run.pk}/").context["chart"]["points"]
    assert len(shown) <= 601 and shown[0][0] == 1 and shown[-1][0] == 3000


def test_the_log_is_shown_from_a_lines_beginning(client, member, tuning_run, data_dir):
    folder = data_dir / "runs" / str(tuning_run.pk)
    folder.mkdir(parents=True)
    (folder / "run.log").write_text("".join(f"line {number} <x>\n" for number in range(3000)))
    client.force_login(member)
    log = client.get(f"/tuning/{tuning_run.pk}/").context["log"]
    assert log.startswith("line ") and log.endswith("line 2999 <x>\n") and len(log) <= 16_000


def test_stop_asks_the_run_and_go_on_queues_a_failed_one(client, member, tuning_run):
    client.force_login(member)
    client.post(f"/tuning/{tuning_run.pk}/cancel/")
    assert Run.objects.get().cancel_requested
    Run.objects.update(status=Run.Status.FAILED)
    client.post(f"/tuning/{tuning_run.pk}/resume/")
    assert Run.objects.get().status == Run.Status.QUEUED


# ---- evaluation


def test_an_evaluation_shows_base_beside_tuned_with_intervals_and_a_verdict(
    client, member, evaluated
):
    client.force_login(member)
    response = client.get(f"/evaluations/{evaluated.pk}/")
    page = text_of(response)
    assert response.context["verdict"] == "better"
    assert page.count('class="ci0" y') == page.count('class="ci1" y') == 4
    assert "10.00 → <strong" in page and "+30.00" in page
    lines = response.context["scale"]["lines"]
    assert [mark["tuned"] for mark in lines[0]["marks"]] == [False, True]
    assert "10.00" in text_of(client.get("/evaluations/")) and "40.00" in text_of(
        client.get("/evaluations/")
    )


@pytest.mark.parametrize(("low", "high", "verdict"), [(-2, -1, "worse"), (-1, 1, "unclear")])
def test_the_verdict_follows_the_intervals(client, member, evaluated, low, high, verdict):
    evaluated.difference = {metric: {"value": 0, "low": low, "high": high} for metric in METRICS}
    evaluated.save()
    client.force_login(member)
    assert client.get(f"/evaluations/{evaluated.pk}/").context["verdict"] == verdict


def test_rows_are_ordered_and_marked(client, member, evaluated):
    Prediction.objects.filter(run=evaluated, row=1).update(scores=dict.fromkeys(METRICS, 1.0))
    client.force_login(member)
    worst = client.get(f"/evaluations/{evaluated.pk}/").context["rows"]
    assert [row["number"] for row in worst] == [2, 1]
    assert (worst[0]["rouge_l"], worst[0]["base_rouge_l"]) == (1.0, 11.0)
    in_order = client.get(f"/evaluations/{evaluated.pk}/?order=row").context["rows"]
    assert [row["number"] for row in in_order] == [1, 2]
    assert "&lt;b&gt;" in in_order[1]["text"]


def test_marks_show_what_a_text_shares_with_the_reference():
    assert (
        marked("今天的裙子真好看", "今天的裙子很好看")
        == '<mark class="same">今天的裙子</mark>很<mark class="same">好看</mark>'
    )
    assert marked("a<b>c", "x<b>y") == 'x<mark class="same">&lt;b&gt;</mark>y'
    assert marked("", "<i>") == "&lt;i&gt;"


def test_an_evaluation_is_started_with_its_base(client, member, dataset, adapter):
    client.force_login(member)
    form = client.get(f"/evaluations/new/?adapter={adapter.pk}").context["form"]
    assert form["model"].value() == f"adapter-{adapter.pk}"
    fields = {
        "model": f"adapter-{adapter.pk}",
        "dataset": dataset.pk,
        "decoding": "greedy",
        "with_baseline": "on",
    }
    refused = client.post("/evaluations/new/", {**fields, "max_examples": "0"})
    assert refused.context["form"].errors["max_examples"] and not EvaluationRun.objects.exists()
    response = client.post("/evaluations/new/", {**fields, "max_examples": "5"})
    run = EvaluationRun.objects.get(adapter=adapter)
    assert response["Location"] == f"/evaluations/{run.pk}/"
    assert run.baseline.adapter is None and run.baseline.total == run.total == 5
