"""Good answers from chat on their way into a dataset."""

import pytest

from chat.conversations.turns import judge
from chat.models import Conversation
from tests.support.uploads import lines, rows, upload
from tests.tuning.datasets.test_api import client_of
from tuning.datasets import store
from tuning.datasets.collecting import collect_answer
from tuning.models import CollectedExample, Dataset

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]
URL = "/api/v1/collected-examples/"


@pytest.fixture
def client(member):
    return client_of(member)


@pytest.fixture
def answer(member, checkpoint):
    talk = Conversation.objects.create(owner=member, checkpoint=checkpoint)
    for role, content in (
        ("user", "你好"),
        ("assistant", "你好！"),
        ("user", "没有得到回答"),
        ("user", "写一句裙子的广告"),
    ):
        talk.messages.create(role=role, content=content)
    return talk.messages.create(
        role="assistant", content="这条裙子很好看。", checkpoint=checkpoint, model_label="base"
    )


def collect(client, answer, **fields):
    return client.post(URL, {"message": answer.pk, **fields}, format="json")


def test_an_answer_becomes_a_row_when_somebody_takes_it(client, member, answer):
    made = collect(client, answer)
    assert made.status_code == 201
    body = made.json()
    assert (body["prompt"], body["response"], body["history"]) == (
        "写一句裙子的广告", "这条裙子很好看。", [["你好", "你好！"]],
    )  # fmt: skip
    assert (body["status"], body["model_label"], body["original"]) == ("waiting", "base", "")
    # the collection is the member's own, made once, and empty until somebody decides
    dataset = Dataset.objects.get()
    assert (dataset.owner, dataset.collects, dataset.current) == (member, True, None)
    detail = f"/api/v1/datasets/{dataset.pk}/"
    assert client.get(detail).json()["rows"] == 0
    assert client.get(f"{detail}examples/").json()["results"] == []
    # corrected later: the same proposal
    again = collect(client, answer, response="这条裙子真好看。").json()
    assert (again["id"], again["original"]) == (body["id"], "这条裙子很好看。")
    taken = client.post(f"{detail}decide/", {"take": [body["id"]]}, format="json")
    assert taken.status_code == 201 and taken.json()["splits"] == {"train": 1}
    row = store.examples(dataset.current, "train", 0, 1)[0]
    assert (row["response"], row["history"]) == ("这条裙子真好看。", [["你好", "你好！"]])
    found = client.get(f"{URL}?status=taken&message={answer.pk}").json()["results"]
    assert [(row["id"], row["version"]) for row in found] == [(body["id"], 1)]
    # it is a row now: neither changed nor taken back nor taken twice
    assert collect(client, answer).status_code == 409
    assert client.delete(f"{URL}{body['id']}/").status_code == 409
    assert client.post(f"{detail}decide/", {"take": [body["id"]]}, format="json").status_code == 400


def test_a_proposal_is_left_out_or_taken_back(client, member, answer):
    dataset = store.ingest(upload(lines(*rows(2))), name="team", owner=member)
    left = collect(client, answer, dataset=dataset.pk).json()
    detail = f"/api/v1/datasets/{dataset.pk}/"
    assert (
        client.post(f"{detail}decide/", {"leave": [left["id"]]}, format="json").status_code == 201
    )
    assert dataset.current.number == 1
    assert CollectedExample.objects.get().decided_by == member
    assert client.delete(f"{URL}{left['id']}/").status_code == 204
    assert not CollectedExample.objects.exists()


def test_only_ended_answers_of_ones_own_conversations_can_be_collected(
    client, member, other_member, answer
):
    question = answer.conversation.messages.filter(role="user").first()
    assert collect(client, question).json()["error"]["param"] == "message"
    assert collect(client, answer, response=" ").json()["error"]["param"] == "response"
    assert collect(client, answer, dataset=999).status_code == 404
    assert collect(client_of(other_member), answer).status_code == 404
    streaming = answer.conversation.messages.create(role="user", content="q")
    streaming = answer.conversation.messages.create(role="assistant", status="streaming")
    assert collect(client, streaming).status_code == 400
    assert not Dataset.objects.exists() and client.post(URL, {}, format="json").status_code == 400


def test_others_neither_see_nor_decide(client, member, other_member, staff, answer):
    made = collect(client, answer).json()
    outsider = client_of(other_member)
    assert outsider.get(f"{URL}{made['id']}/").status_code == 404
    assert outsider.get(URL).json()["results"] == []
    path = f"/api/v1/datasets/{made['dataset']}/decide/"
    assert outsider.post(path, {"take": [made["id"]]}, format="json").status_code == 404
    # into the team's dataset: proposed by a member, decided by staff
    team = Dataset.objects.create(name="team", prompt_column="prompt", response_column="response")
    made = collect(client, answer, dataset=team.pk).json()
    path = f"/api/v1/datasets/{team.pk}/decide/"
    assert client.post(path, {"take": [made["id"]]}, format="json").status_code == 403
    assert client_of(staff).post(path, {"take": [made["id"]]}, format="json").status_code == 201
    assert team.current.splits["train"]["rows"] == 1


def test_the_better_of_compared_answers_is_proposed(member, answer):
    """And no longer, once another is found better, or none; what was corrected stays."""
    talk = answer.conversation
    made = talk.comparisons.create()
    question = talk.messages.filter(role="user").last()
    about = {"role": "assistant", "comparison": made, "parent": question}
    first = talk.messages.create(content="甲", **about)
    answer.comparison, answer.parent = made, question
    answer.save()

    def proposed():
        found = CollectedExample.objects.filter(by=member)
        return [(row.prompt, row.response, row.status) for row in found]

    judge(made, "better", answer)
    assert proposed() == [("写一句裙子的广告", "这条裙子很好看。", "waiting")]
    judge(made, "better", first)
    assert [response for _prompt, response, _status in proposed()] == ["甲"]
    judge(made, "none", None)
    assert proposed() == []
    collect_answer(member, answer, response="改过的")
    judge(made, "better", first)
    assert sorted(response for _prompt, response, _status in proposed()) == ["改过的", "甲"]
