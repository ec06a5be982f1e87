"""Blind review: sides are hidden and drawn, votes are counted, the result has its interval."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError

from chat.models import Conversation
from evaluation import blind
from evaluation.models import BlindVote, EvaluationRun, Prediction
from tests.support.page_fixtures import *  # noqa: F403  this page's rows
from tests.support.page_rows import evaluation, text_of

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_worker")]
ROWS = 24


@pytest.fixture
def two(member, dataset, checkpoint, adapter):
    runs = [evaluation(member, dataset, checkpoint, each) for each in (None, adapter)]
    Prediction.objects.all().delete()
    for run, word in zip(runs, ("基座", "微调"), strict=True):
        Prediction.objects.bulk_create(
            Prediction(
                run=run,
                row=row,
                prompt=f"问{row}",
                reference="参考",
                text="同样的话" if row == 0 else f"{word}的回答{row}",
                scores={},
            )
            for row in range(ROWS)
        )
    EvaluationRun.objects.update(recipe={"dataset": {"sha256": "s"}})
    return [EvaluationRun.objects.get(pk=run.pk) for run in runs]


def test_a_person_decides_by_text_alone_until_all_rows_are_done(client, member, two):
    base, tuned = two
    client.force_login(member)
    address = f"/evaluations/{base.pk}/blind/{tuned.pk}/"
    sides = []
    for _row in range(1, ROWS):  # the row whose answers are the same is not asked about
        response = client.get(address)
        question = response.context["question"]
        page = text_of(response)
        assert "tuned" not in page and question["row"] != 0
        assert client.get(address).context["question"] == question  # stays on its side
        sides.append("left" if question["left"].startswith("微调") else "right")
        side = sides[-1] if question["row"] % 4 else "tie"
        client.post(address, {"row": question["row"], "side": side})
    assert {"left", "right"} == set(sides)  # drawn
    end = client.get(address, follow=True)
    told = end.context["people"]
    assert (told["run"], told["other"], told["tie"]) == (18, 0, 5)
    assert told["verdict"] == "run" and told["low"] > 50 and told["p"] < 0.001
    assert f"#{tuned.pk}" in text_of(end)


def test_bad_votes_and_other_peoples_pairs(client, member, other_member, two):
    base, tuned = two
    client.force_login(member)
    address = f"/evaluations/{base.pk}/blind/{tuned.pk}/"
    for data in (
        {},
        {"row": "²", "side": "left"},
        {"row": 1, "side": "up"},
        {"row": 99, "side": "tie"},
    ):
        assert client.post(address, data).status_code == 302
    assert not BlindVote.objects.exists()
    assert client.get(f"/evaluations/{base.pk}/blind/{base.pk}/").status_code == 404
    client.force_login(other_member)
    assert client.get(address).status_code == 404
    assert client.get(f"{address}result/").status_code == 404


def test_agreement_between_reviewers(member, other_member, two):
    tuned, base = two[1], two[0]
    for user, choices in ((member, "rrot"), (other_member, "rorr")):
        names = {"r": "run", "o": "other", "t": "tie"}
        BlindVote.objects.bulk_create(
            BlindVote(run=tuned, other=base, row=row, by=user, choice=names[choice])
            for row, choice in enumerate(choices)
        )
    told = blind.result(tuned, base)
    assert (told["reviewers"], told["agreement"]) == (2, 25.0)
    chance = (5 / 8) ** 2 + (2 / 8) ** 2 + (1 / 8) ** 2
    assert told["kappa"] == pytest.approx((0.25 - chance) / (1 - chance))
    assert told["verdict"] == "cannot_tell"
    BlindVote.objects.create(run=tuned, other=base, row=9, by=member, choice="run", judge="gpt")
    assert blind.result(tuned, base)["votes"] == 8  # a model is no reviewer
    assert blind.result(tuned, base, judges=True)["run"] == 1


def test_intervals_and_the_sign_test_are_the_textbooks():
    low, high = blind.wilson(8, 10)  # Wilson 1927: 0.490 to 0.943
    assert (low, high) == (pytest.approx(49.0, abs=0.1), pytest.approx(94.3, abs=0.1))
    assert blind.wilson(0, 0) == (None, None) and blind.sign_test(0, 0) is None
    assert blind.sign_test(9, 1) == pytest.approx(22 / 1024)
    assert blind.agreed([]) == (None, None)
    assert blind.agreed([(1, "run"), (1, "run")]) == (100.0, None)


class Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible judge: prefers 微调, but always says A where the row is even."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        first = re.search(r"Answer A:\n(.*)", text).group(1)
        number = int(re.search(r"\d+", first).group())
        reply = "A" if number % 2 == 0 or "微调" in first else "B."
        self.server.keys.append(self.headers.get("Authorization"))
        status = 200 if body["model"] == "judge" else 404
        content = json.dumps({"choices": [{"message": {"content": f"Answer: {reply}"}}]}).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.keys = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_model_judges_both_ways_round_and_is_marked(
    client, member, admin_user, two, endpoint, tmp_path, capsys
):
    (tmp_path / "key").write_text("secret\n")
    base, tuned = two
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    ask = ["judge", str(base.pk), str(tuned.pk), "--url", url]
    call_command(*ask, "--model", "judge", "--key-file", str(tmp_path / "key"), "--json")
    told = json.loads(capsys.readouterr().out)
    # 23 rows differ: 12 odd ones, where it knows, and 11 even ones, where it favours a side
    assert (told["run_id"], told["run"], told["tie"], told["other"]) == (tuned.pk, 12, 11, 0)
    assert set(endpoint.keys) == {"Bearer secret"} and len(endpoint.keys) == 46
    assert blind.result(tuned, base)["votes"] == 0
    client.force_login(member)
    client.cookies["django_language"] = "en"
    page = text_of(client.get(f"/evaluations/{base.pk}/blind/{tuned.pk}/result/"))
    assert "A model as judge, not people" in page
    with pytest.raises(CommandError, match="404"):
        call_command(*ask, "--model", "another")


def test_what_was_preferred_in_chat_stands_apart(client, member, two):
    """Of comparisons in which both models took part; nobody's conversation is shown."""
    base, tuned = two

    def compared(verdict, chosen=None):
        conversation = Conversation.objects.create(owner=member, title="x")
        made = conversation.comparisons.create(verdict=verdict)
        for run in two:
            told = {"checkpoint": run.checkpoint, "adapter": run.adapter, "comparison": made}
            answer = conversation.messages.create(role="assistant", content="秘密", **told)
            if run is chosen:
                made.chosen = answer
        made.save()

    for verdict, chosen in [("better", tuned)] * 3 + [("better", base), ("same", None)]:
        compared(verdict, chosen)
    compared("none")
    compared("")
    client.force_login(member)
    address = f"/evaluations/{tuned.pk}/blind/{base.pk}/result/"
    response = client.get(address)
    told = response.context["chat"]
    assert (told["run"], told["other"], told["tie"], told["reviewers"]) == (3, 1, 1, 1)
    assert response.context["people"]["votes"] == 0 and "秘密" not in text_of(response)
