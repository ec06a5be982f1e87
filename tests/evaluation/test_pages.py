"""Evaluations: the form, scores beside the base's, rows."""

import pytest

from evaluation.models import METRICS, EvaluationRun, Prediction
from evaluation.reading import marked
from tests.support.page_fixtures import *  # noqa: F403  this page's rows
from tests.support.page_rows import text_of

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_worker")]


def test_an_evaluation_shows_base_beside_tuned_with_intervals_and_a_verdict(
    client, member, evaluated
):
    client.force_login(member)
    client.cookies["django_language"] = "en"
    response = client.get(f"/evaluations/{evaluated.pk}/")
    page = text_of(response)
    assert "↑ better than the base" in page and "lies above zero" in page
    assert page.count('class="ci0" y') == page.count('class="ci1" y') == len(METRICS)
    assert "10.00 → <strong" in page and "+30.00" in page
    lines = response.context["scale"]["lines"]
    assert [mark["tuned"] for mark in lines[0]["marks"]] == [False, True]
    assert "10.00" in text_of(client.get("/evaluations/")) and "40.00" in text_of(
        client.get("/evaluations/")
    )


@pytest.mark.parametrize(
    ("low", "high", "badge", "sentence"),
    [
        (-2, -1, 'data-tone="bad">↓ worse than the base', "lies below zero"),
        (-1, 1, 'data-tone="">≈ cannot tell', "holds zero"),
    ],
)
def test_the_verdict_follows_the_intervals(client, member, evaluated, low, high, badge, sentence):
    evaluated.difference = {metric: {"value": 0, "low": low, "high": high} for metric in METRICS}
    evaluated.save()
    client.force_login(member)
    client.cookies["django_language"] = "en"
    page = text_of(client.get(f"/evaluations/{evaluated.pk}/"))
    assert badge in page and sentence in page


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
