"""Pages on which rows are changed, reviewed, compared and checked."""

import pytest

from portal.models import Run
from tests.support.page_fixtures import *  # noqa: F403  this page's rows
from tests.support.page_rows import text_of
from tests.support.uploads import lines, upload
from tests.tuning.datasets.test_checks import carry_out
from tuning.datasets import store
from tuning.models import CheckRun, CollectedExample, Dataset

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_worker")]


@pytest.fixture(autouse=True)
def english(client, member):
    client.force_login(member)
    client.cookies["django_language"] = "en"


def first(dataset, count=3):
    version = Dataset.objects.get(pk=dataset.pk).current
    return [(row["prompt"], row["response"]) for row in store.examples(version, "train", 0, count)]


def fields(version, **more):
    return {"version": version, "prompt": "问0", "response": "答0", "history": "", **more}


def test_a_row_is_changed_left_out_and_added_as_versions_whose_difference_is_shown(client, dataset):
    page = f"/datasets/{dataset.pk}/rows/train/1/"
    assert "答0" in text_of(client.get(page))
    client.post(page, fields(1, response="<b>好</b>\r\n答0"))
    assert first(dataset, 1) == [("问0", "<b>好</b>\n答0")]
    shown = text_of(client.get(f"/datasets/{dataset.pk}/versions/2/"))
    assert "&lt;b&gt;好&lt;/b&gt;" in shown and "<b>好</b>" not in shown and "changed" in shown
    client.post(page, fields(2, exclude="1"))
    assert first(dataset, 1) == [("问1", "答1")]
    client.post(f"/datasets/{dataset.pk}/rows/new/", fields(3, prompt="新"))
    assert Dataset.objects.get().current.rows == 50
    versions = text_of(client.get(f"/datasets/{dataset.pk}/"))
    assert "0 changed, 1 left out, 0 added" in versions
    late = client.post(page, fields(1))
    assert late.status_code == 422 and "meanwhile" in text_of(late)
    empty = client.post(page, fields(4, response="  "))
    assert empty.status_code == 422 and empty.context["form"].errors["response"]
    assert client.get(f"/datasets/{dataset.pk}/rows/train/51/").status_code == 404
    assert client.get(f"/datasets/{dataset.pk}/rows/dev/1/").status_code == 404


def test_others_may_look_at_the_portals_rows_and_change_none(client, dataset, other_member):
    Dataset.objects.update(owner=None)
    page = f"/datasets/{dataset.pk}/rows/train/1/"
    assert "<textarea" not in text_of(client.get(page))
    assert client.post(page, fields(1)).status_code == 404
    assert client.post(f"/datasets/{dataset.pk}/rows/new/", fields(1)).status_code == 404
    assert client.post(f"/datasets/{dataset.pk}/merge/", {"other": dataset.pk}).status_code == 404
    assert dataset.versions.count() == 1


def test_answers_under_review_are_taken_and_left_out(client, member, dataset):
    for number in range(3):
        CollectedExample.objects.create(
            dataset=dataset, by=member, prompt=f"<i>{number}</i>", response="答", original="<u>旧"
        )
    assert "3 answers wait" in text_of(client.get(f"/datasets/{dataset.pk}/"))
    page = client.get(f"/datasets/{dataset.pk}/review/")
    assert "<i>0" not in text_of(page) and "&lt;u&gt;旧" in text_of(page)
    ids = [example.pk for example in page.context["page"]]
    client.post(f"/datasets/{dataset.pk}/review/", {"leave": ids[0]})
    client.post(f"/datasets/{dataset.pk}/review/", {"take": ids[1:]})
    assert dataset.current.rows == 52 and dataset.current.number == 2
    assert "Nothing waits" in text_of(client.get(f"/datasets/{dataset.pk}/review/"))


def test_rows_are_merged_and_taken_away(client, member, dataset):
    other = store.ingest(
        upload(lines({"content": "新", "summary": "答"})), name="more", owner=member
    )
    client.post(f"/datasets/{dataset.pk}/merge/", {"other": other.pk})
    assert dataset.current.rows == 51
    again = client.post(f"/datasets/{dataset.pk}/merge/", {"other": other.pk}, follow=True)
    assert "All its rows are here already." in text_of(again)
    answer = client.get(f"/datasets/{dataset.pk}/export/train.csv")
    assert answer.status_code == 200 and "attachment" in answer["Content-Disposition"]
    assert client.get(f"/datasets/{dataset.pk}/export/train.xls").status_code == 404


def test_a_check_is_started_watched_and_read(client, dataset, tiny_checkpoint):
    started = client.post(f"/datasets/{dataset.pk}/check/", {"checkpoint": tiny_checkpoint.pk})
    run = CheckRun.objects.get()
    assert started.url == f"/checks/{run.pk}/"
    assert client.get(started.url).context["page_is_live"]
    assert f"/checks/{run.pk}/" in text_of(client.get("/tasks/"))
    assert f"/checks/{run.pk}/" in text_of(client.get("/"))
    carry_out(run)
    read = client.get(f"{started.url}?max_source_length=4&max_target_length=4")
    assert "50 of 50 responses are longer than 4 tokens" in text_of(read)
    assert "Every row fits" in text_of(client.get(started.url))
    row = f"/datasets/{dataset.pk}/rows/train/1/?checkpoint={tiny_checkpoint.pk}"
    shown = client.get(row)
    assert shown.context["learnt"] and "<mark" in text_of(shown)
    Run.objects.update(status=Run.Status.FAILED, error={"code": "checkpoint_invalid"})
    client.post(f"{started.url}resume/")
    assert CheckRun.objects.get().status == Run.Status.QUEUED
    client.post(f"{started.url}cancel/")
    assert CheckRun.objects.get().status == Run.Status.CANCELLED
