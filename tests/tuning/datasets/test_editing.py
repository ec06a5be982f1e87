"""Rows fixed, left out, added, merged and taken away, over REST; and what others cannot do."""

import csv
import io
import json

import pytest
from asgiref.sync import async_to_sync

from portal.models import Run
from tests.support.uploads import lines, upload
from tests.tuning.datasets.test_api import client_of
from tests.tuning.datasets.test_datasets import a_run
from tuning.datasets import editing, exporting, store
from tuning.datasets.store import ingest
from tuning.models import Dataset

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]
URL = "/api/v1/datasets/"


def pair(number: int) -> dict:
    return {"content": f"问{number}", "summary": f"答{number}"}


@pytest.fixture
def client(member):
    return client_of(member)


@pytest.fixture
def dataset(member):
    return ingest(upload(lines(*map(pair, range(1, 6)))), name="mine", owner=member)


def held(dataset, split="train") -> list[tuple[str, str]]:
    version = Dataset.objects.get(pk=dataset.pk).current
    return [(row["prompt"], row["response"]) for row in store.examples(version, split, 0, 1000)]


def post(client, dataset, action, **body):
    return client.post(f"{URL}{dataset.pk}/{action}/", body, format="json")


def test_a_change_is_a_new_version_and_the_old_one_stays(client, dataset, member):
    run = a_run(dataset, member, Run.Status.RUNNING)
    before = dataset.current
    answer = post(
        client,
        dataset,
        "rows",
        version=1,
        replace=[{"line": 2, "prompt": "问2", "response": "好的，答2", "history": [["甲", "乙"]]}],
        exclude=[4, 5],
        add=[{"prompt": " 新问 ", "response": "新答\n"}],
    )
    assert answer.status_code == 201 and answer.json()["version"] == 2
    assert held(dataset) == [
        ("问1", "答1"),
        ("问2", "好的，答2"),
        ("问3", "答3"),
        (" 新问 ", "新答\n"),
    ]
    # the run goes on reading what it was made for
    run.refresh_from_db()
    assert run.dataset_version == before
    assert [row["prompt"] for row in store.examples(before, "train", 0, 9)][3] == "问4"
    change = Dataset.objects.get().current.change
    assert change == {"action": "edit", "split": "train", "changed": 1, "excluded": 2, "added": 1}
    told = client.get(f"{URL}{dataset.pk}/difference/").json()
    assert [(row["kind"], row["line"]) for row in told] == [
        ("changed", 2), ("added", 4), ("removed", 4), ("removed", 5),
    ]  # fmt: skip
    assert (told[0]["before"]["response"], told[0]["after"]["response"]) == ("答2", "好的，答2")
    assert client.get(f"{URL}{dataset.pk}/difference/?from=2&to=2").json() == []
    assert client.get(f"{URL}{dataset.pk}/difference/?from=9").status_code == 400


def test_who_looked_at_an_older_version_changes_nothing(client, dataset):
    assert post(client, dataset, "rows", version=1, exclude=[1]).status_code == 201
    late = post(client, dataset, "rows", version=1, exclude=[1])
    assert (late.status_code, late.json()["error"]["code"]) == (409, "changed_meanwhile")
    assert [prompt for prompt, _ in held(dataset)] == ["问2", "问3", "问4", "问5"]


def test_two_that_change_at_once_do_not_lose_one_change(dataset, member):
    base = dataset.current
    editing.change_rows(dataset, base=base, excluded=[1])
    with pytest.raises(editing.ValidationError) as late:
        editing.change_rows(dataset, base=base, excluded=[2])
    assert late.value.code == "changed_meanwhile"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"exclude": [6]}, None),
        ({"exclude": [1, 2, 3, 4, 5]}, None),
        ({"exclude": [0]}, "exclude.0"),
        ({"replace": [{"line": 9, "prompt": "a", "response": "b"}]}, None),
        ({"add": [{"prompt": "a", "response": " "}]}, "response"),
        ({"add": [{"prompt": "\n", "response": "b"}]}, "prompt"),
        ({"add": [{"prompt": "a", "response": "b", "history": [["x"]]}]}, None),
        ({"add": [{"prompt": "a"}]}, None),
        ({"split": "dev", "exclude": [1]}, "split"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused_whole(client, dataset, body, param):
    answer = post(client, dataset, "rows", **body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    if param:
        assert answer.json()["error"]["param"] == param
    assert Dataset.objects.get().versions.count() == 1


def test_half_a_character_is_no_row():
    with pytest.raises(editing.ValidationError) as refused:
        editing.line_of("a", "b\ud800")
    assert "response" in refused.value.error_dict


def test_merging_adds_what_is_not_here_split_by_split(client, dataset, member, other_member):
    other = ingest(
        upload(lines(*map(pair, range(4, 9)))),
        name="more",
        owner=member,
        validation=upload(lines(pair(20)), "dev.json"),
    )
    answer = post(client, dataset, "merge", other=other.pk)
    assert answer.status_code == 201 and answer.json()["splits"] == {"train": 8, "validation": 1}
    assert [prompt for prompt, _ in held(dataset)] == [f"问{n}" for n in range(1, 9)]
    change = Dataset.objects.get(pk=dataset.pk).current.change
    assert (change["added"], change["repeated"], change["other"]["id"]) == (4, 2, other.pk)
    again = post(client, dataset, "merge", other=other.pk)
    assert again.status_code == 400 and again.json()["error"]["param"] == "other"
    theirs = ingest(upload(lines(pair(1))), name="x", owner=other_member)
    assert post(client, dataset, "merge", other=theirs.pk).status_code == 400
    assert post(client, dataset, "merge", other=dataset.pk).status_code == 400


def exported(client, dataset, query="") -> bytes:
    answer = client.get(f"{URL}{dataset.pk}/export/?{query}")
    assert answer.status_code == 200 and "attachment" in answer["Content-Disposition"]
    return async_to_sync(whole)(answer)


async def whole(answer) -> bytes:
    return b"".join([piece async for piece in answer.streaming_content])


def test_what_is_taken_away_comes_back_as_it_was(client, member, monkeypatch):
    monkeypatch.setattr(exporting, "_AT_ONCE", 2)
    rows = [
        {"prompt": '问"1",\n', "response": "=1+1", "history": [["早", "好"]]},
        {"prompt": "问2", "response": "-减"},
        {"prompt": "问3", "response": "'常"},
    ]
    dataset = ingest(upload(lines(*rows)), name="x", owner=member)
    want = held(dataset)
    for form in ("jsonl", "json"):
        again = ingest(
            upload(exported(client, dataset, f"form={form}"), f"x.{form}"), name="y", owner=member
        )
        assert held(again) == want and again.current.sha256 == dataset.current.sha256
    table = list(csv.reader(io.StringIO(exported(client, dataset, "form=csv").decode("utf-8-sig"))))
    assert table[0] == ["prompt", "response", "history"]
    assert table[1] == ['问"1",\n', "'=1+1", json.dumps([["早", "好"]], ensure_ascii=False)]
    assert [row[1] for row in table[2:]] == ["'-减", "'常"]
    for query in ("form=xls", "split=dev", "version=7"):
        assert client.get(f"{URL}{dataset.pk}/export/?{query}").status_code == 400


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", "\t=1", " =1", "\r=1", "＝1"])
def test_no_cell_of_a_table_is_computed(text):
    assert exporting.safe_cell(text) == f"'{text}"
    assert exporting.safe_cell("1=1") == "1=1"
