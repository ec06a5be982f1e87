"""Any two evaluations of the same rows, several at once, one row; review; files to take away."""

import csv
import io
import json

import pytest
from django.core.management import call_command

from evaluation.comparison import compare, compare_all
from evaluation.metrics import METRICS
from evaluation.models import EvaluationRun, Prediction
from evaluation.rescoring import score_again
from evaluation.verdicts import of_metric, overall
from portal.models import ApiKey
from tests.support.page_fixtures import *  # noqa: F403  this page's rows
from tests.support.page_rows import evaluation, text_of
from tuning.datasets import store

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_worker")]
SAME = {"dataset": {"sha256": "s", "name": "ads", "version": 1}, "rows": 40}


def made(member, dataset, checkpoint, adapter=None, gain=0.0, rows=40, wobble=0):
    run = evaluation(member, dataset, checkpoint, adapter, 30.0 + gain, total=rows)
    run.predictions.all().delete()
    Prediction.objects.bulk_create(
        Prediction(
            run=run,
            row=row,
            prompt=f"问{row}",
            reference="今天的裙子真好看",
            text=f"{row}裙子",
            scores=dict.fromkeys(METRICS, 30.0 + row % 5 + gain + (wobble if row % 2 else -wobble)),
        )
        for row in range(rows)
    )
    EvaluationRun.objects.filter(pk=run.pk).update(recipe=SAME)
    run.refresh_from_db()
    return run


def test_any_evaluation_is_compared_with_any_other_in_words(member, dataset, checkpoint, adapter):
    base = made(member, dataset, checkpoint)
    early = made(member, dataset, checkpoint, adapter, gain=2.0)
    late = made(member, dataset, checkpoint, adapter, gain=5.0)
    told = compare(late, early)
    assert told["verdicts"]["rouge-l"]["verdict"] == "better"
    assert "+3.00" in told["verdicts"]["rouge-l"]["sentence"]
    assert compare(base, late)["verdicts"]["bleu-4"]["verdict"] == "worse"
    assert compare(late, late)["verdicts"]["rouge-l"]["verdict"] == "cannot_tell"


def test_several_at_once_are_corrected(member, dataset, checkpoint, adapter):
    base = made(member, dataset, checkpoint)
    runs = [made(member, dataset, checkpoint, adapter, gain, wobble=5) for gain in (1.8, 0.1, 0, 0)]
    alone = compare(runs[0], base)
    assert alone["verdicts"]["rouge-l"]["verdict"] == "better"
    together = compare_all(base, runs)[0]
    told = together["difference"]["rouge-l"]
    assert told["p_corrected"] == pytest.approx(4 * told["p"], abs=1e-6)
    if told["p_corrected"] > 0.05:
        assert together["verdicts"]["rouge-l"]["verdict"] == "cannot_tell"
        assert "Holm" in together["verdicts"]["rouge-l"]["sentence"]


def test_one_row_says_so(member, dataset, checkpoint, adapter):
    base, one = (made(member, dataset, checkpoint, each, rows=1) for each in (None, adapter))
    told = compare(one, base)
    assert told["difference"]["rouge-l"]["low"] is None
    assert told["verdicts"]["rouge-l"]["verdict"] == "one_row"
    assert overall(told["difference"])["verdict"] == "one_row"
    assert of_metric("length-ratio", {"value": 1, "low": 0.5, "high": 2}, 50)["verdict"] == "higher"


def test_the_page_and_rest_compare_several(client, member, dataset, checkpoint, adapter):
    client.force_login(member)
    client.cookies["django_language"] = "en"
    base = made(member, dataset, checkpoint)
    runs = [made(member, dataset, checkpoint, adapter, gain) for gain in (5.0, 0.0)]
    address = f"/evaluations/compare/?run={base.pk}&run={runs[0].pk}&run={runs[1].pk}"
    response = client.get(address)
    page = text_of(response)
    assert response.context["baseline"] == base  # the bare checkpoint among them
    assert "2 comparisons at once" in page and "ROUGE-L is better: +5.00" in page
    assert "holds zero" in page
    key = ApiKey.create_for(member)[1]
    headers = {"authorization": f"Bearer {key}"}
    url = "/api/v1/evaluation-runs/comparison/"
    told = client.get(
        f"{url}?baseline={base.pk}&runs={runs[0].pk},{runs[1].pk}", headers=headers
    ).json()
    assert [each["id"] for each in told["comparisons"]] == [run.pk for run in runs]
    assert told["comparisons"][0]["verdicts"]["rouge-l"]["verdict"] == "better"
    assert told["comparisons"][0]["difference"]["rouge-l"]["p_corrected"] < 0.05
    for query in ("", "?baseline=x&runs=1", f"?baseline={base.pk}&runs=²"):
        refused = client.get(url + query, headers=headers)
        assert refused.status_code == 400 and refused.json()["error"]["message"]
    assert client.get(f"{url}?baseline={base.pk}&runs=99999", headers=headers).status_code == 404
    for query in ("", "?run=²", "?run=99999", "?baseline=x&run=1"):
        assert client.get(f"/evaluations/compare/{query}").status_code == 404


def test_other_peoples_and_other_rows_are_refused(
    client, other_member, member, dataset, checkpoint
):
    mine, other = made(member, dataset, checkpoint), made(member, dataset, checkpoint)
    client.force_login(other_member)
    assert client.get(f"/evaluations/compare/?run={mine.pk}").status_code == 404
    EvaluationRun.objects.filter(pk=other.pk).update(recipe={"dataset": {"sha256": "else"}})
    client.force_login(member)
    client.cookies["django_language"] = "en"
    page = text_of(client.get(f"/evaluations/compare/?baseline={mine.pk}&run={other.pk}"))
    assert "different rows" in page
    EvaluationRun.objects.filter(pk=other.pk).update(scores=None, status="running", recipe=SAME)
    page = text_of(client.get(f"/evaluations/compare/?baseline={mine.pk}&run={other.pk}"))
    assert "must have ended with scores" in page


def test_rows_are_filtered_and_noted(client, member, evaluated):
    client.force_login(member)
    rows = evaluated.predictions
    rows.filter(row=0).update(scores={**dict.fromkeys(METRICS, 1.0), "repetition": 50.0}, text=" ")
    Prediction.objects.create(
        run=evaluated, row=2, prompt="p", reference="短", text="长" * 9, scores={"rouge-l": 99}
    )

    def shown(query):
        page = client.get(f"/evaluations/{evaluated.pk}/?{query}")
        return [row["number"] for row in page.context["rows"]]

    assert shown("show=regressions") == [1] and shown("show=empty") == [1]
    assert shown("show=repeated") == [1] and shown("show=long") == [3]
    assert shown("order=best") == [2, 1, 3] and shown("order=row") == [1, 2, 3]
    assert shown("show=flagged") == []
    client.post(f"/evaluations/{evaluated.pk}/rows/1/", {"flagged": "1", "show": "flagged"})
    assert shown("show=flagged") == [2]
    assert client.post(f"/evaluations/{evaluated.pk}/rows/77/").status_code == 404
    page = text_of(client.get(f"/evaluations/{evaluated.pk}/?marks=changes&order=row"))
    assert "<del>今天的</del>" in page or "<ins>" in page


def test_a_reviewer_decides_with_a_note_and_the_log_has_it(client, staff, member, evaluated):
    address = f"/evaluations/{evaluated.pk}/review/"
    client.force_login(member)
    client.post(address, {"decision": "approved"})
    evaluated.refresh_from_db()
    assert evaluated.review == ""  # members look on
    client.force_login(staff)
    client.post(address, {"decision": "rejected"})
    evaluated.refresh_from_db()
    assert evaluated.review == ""  # a rejection says why
    client.post(address, {"decision": "rejected", "note": "too short"})
    evaluated.refresh_from_db()
    assert (evaluated.review, evaluated.reviewed_by) == ("rejected", staff)
    from django.contrib.admin.models import LogEntry

    entry = LogEntry.objects.get()
    assert entry.user == staff and entry.change_message == "rejected: too short"
    assert "too short" in text_of(client.get(f"/evaluations/{evaluated.pk}/"))


def test_files_to_take_away(client, member, evaluated):
    evaluated.predictions.filter(row=0).update(text='=HYPERLINK("x")', prompt="-1")
    client.force_login(member)
    address = f"/api/v1/evaluation-runs/{evaluated.pk}/"
    content = client.get(f"{address}predictions.csv/").getvalue().decode("utf-8-sig")
    first = next(csv.DictReader(io.StringIO(content)))
    assert first["prediction"] == '\'=HYPERLINK("x")' and first["prompt"] == "'-1"
    assert first["rouge-l"] == "40.0" and first["base"] == "今天的裙子很好看"
    whole = json.loads(client.get(f"{address}run.json/").getvalue())
    assert [row["row"] for row in whole["predictions"]] == [0, 1]
    assert whole["scores"]["rouge-l"]["value"] == 40.0
    page = client.get(f"/evaluations/{evaluated.pk}/report/")
    assert "=HYPERLINK(&quot;x&quot;)" in page.content.decode()


def test_scores_are_counted_again_for_metrics_that_came_later(member, evaluated, capsys):
    scores = score_again(evaluated)
    assert {"rouge-l", "sacrebleu", "chrf", "length-ratio"} <= set(scores)
    assert scores["bleu-4"]["value"] != 40.0  # what the texts say
    call_command("score_again", str(evaluated.baseline_id))
    assert "chrf" in capsys.readouterr().out
    evaluated.refresh_from_db()
    assert "chrf" in evaluated.difference


def test_with_approval_needed_the_team_gets_what_a_reviewer_approved(
    client, staff, evaluated, settings
):
    settings.APPROVAL_NEEDED = True
    adapter = evaluated.adapter
    client.force_login(staff)
    share = f"/adapters/{adapter.pk}/"
    client.post(share, {"action": "share"})
    adapter.refresh_from_db()
    assert not adapter.shared
    headers = {"authorization": f"Bearer {ApiKey.create_for(staff)[1]}"}
    patch = {"data": {"shared": True}, "content_type": "application/json", "headers": headers}
    refused = client.patch(f"/api/v1/adapters/{adapter.pk}/", **patch)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "approval_needed"
    review = f"/evaluations/{evaluated.pk}/review/"
    client.post(review, {"decision": "approved", "note": "good"})
    client.post(share, {"action": "share"})
    adapter.refresh_from_db()
    assert adapter.shared
    client.post(share, {"action": "unshare"})
    client.post(review, {"decision": "rejected", "note": "no"})
    client.post(share, {"action": "share"})
    adapter.refresh_from_db()
    assert not adapter.shared


def test_the_leaderboard_has_the_newest_of_every_model_on_the_same_rows(
    client, member, other_member, dataset, checkpoint, adapter
):
    client.force_login(member)
    base = made(member, dataset, checkpoint)
    made(member, dataset, checkpoint, adapter, gain=-9)  # an older one of the same model
    newest = made(member, dataset, checkpoint, adapter, gain=5)
    board = client.get(f"/evaluations/leaderboard/?dataset={dataset.pk}").context["boards"][0]
    assert board["runs"] == [newest, base]
    assert client.get("/evaluations/leaderboard/?dataset=99999").status_code == 404
    client.force_login(other_member)
    assert client.get("/evaluations/leaderboard/").context["boards"] == []


def test_bad_rows_are_left_out_of_the_datasets_next_version(
    client, member, other_member, dataset, evaluated
):
    client.force_login(member)
    before = store.examples(dataset.current, "train", 0, 3)
    for row in (0, 1):  # the second is looked for in the version that the first one made
        client.post(f"/evaluations/{evaluated.pk}/rows/{row}/", {"exclude": "1"})
    newest = dataset.current
    assert (newest.number, newest.splits["train"]["rows"]) == (3, 48)
    assert store.examples(newest, "train", 0, 1)[0]["prompt"] == before[2]["prompt"]
    client.post(f"/evaluations/{evaluated.pk}/rows/0/", {"exclude": "1"})  # gone already
    client.post(f"/evaluations/{evaluated.pk}/rows/777/", {"exclude": "1"})
    assert dataset.current == newest
    client.force_login(other_member)
    gone = client.post(f"/evaluations/{evaluated.pk}/rows/2/", {"exclude": "1"})
    assert gone.status_code == 404 and dataset.current == newest


def test_the_admin_draws_the_loss_and_compares_what_is_selected(
    client, admin_user, tuning_run, evaluated, settings
):
    # nothing is collected in the tests
    plain = {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}
    settings.STORAGES = {**settings.STORAGES, "staticfiles": plain}
    client.force_login(admin_user)
    page = text_of(client.get(f"/admin/tuning/tuningrun/{tuning_run.pk}/change/"))
    assert "<polyline points=" in page and "4.9000" in page
    numbers = [evaluated.pk, evaluated.baseline_id]
    listed = "/admin/evaluation/evaluationrun/"
    sent = client.post(listed, {"action": "compare", "_selected_action": numbers})
    assert sent["Location"] == f"/evaluations/compare/?run={min(numbers)}&run={max(numbers)}"
    EvaluationRun.objects.filter(pk=evaluated.pk).update(
        general={"kept": 3, "base_right": 4, "answers": []}, review="approved"
    )
    page = text_of(client.get(listed))
    assert "75 %" in page and "portal/admin.css" in page
    assert client.get("/admin/admin/logentry/").status_code == 200
    for path in ("django_q/schedule", "django_q/success", "django_q/ormq"):
        assert client.get(f"/admin/{path}/").status_code == 404
