"""Figures of runs taken away: TensorBoard's files, and an MLflow server that stands in."""

import json
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from evaluation import figures as scores
from portal.models import Run
from portal.runs import process
from portal.runs.figures import Figure, event_file
from portal.runs.work import RunWork
from tests.support.page_fixtures import *  # noqa: F403
from tests.support.page_rows import text_of
from tuning import figures as curves
from tuning.models import TuningMetric

pytestmark = pytest.mark.django_db
API = "/api/2.0/mlflow/"


def scalars(content: bytes) -> list[tuple[str, int, float]]:
    """(tag, step, value) of an event file: records of a length and its checksum, the event and its
    checksum (tensorflow.org, "TFRecord").
    """
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data: bytes) -> int:
        value = crc32c(data)
        return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF

    found, at = [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = content[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", content, at + 8)[0] == masked(content[at : at + 8])
        assert struct.unpack_from("<I", content, at + 12 + length)[0] == masked(event)
        parsed = Event.FromString(event)
        found += [(value.tag, parsed.step, value.simple_value) for value in parsed.summary.value]
        at += 16 + length
    return found


def test_an_event_file_holds_the_points_in_order():
    points = [Figure("train/loss", step, 2.0 - step, 1e9 + step) for step in (0, 1)]
    points.append(Figure("score/rouge-1", 7, 31.5, 1e9))
    assert scalars(event_file(points)) == [
        ("train/loss", 0, 2.0), ("train/loss", 1, 1.0), ("score/rouge-1", 7, 31.5)
    ]  # fmt: skip


def test_curves_and_scores_are_downloads_of_who_sees_the_run(
    client, member, other_member, tuning_run, evaluated
):
    TuningMetric.objects.create(run=tuning_run, step=30, loss=2.5, learning_rate=0.02)
    TuningMetric.objects.create(
        run=tuning_run, step=40, loss=float("inf"), learning_rate=0.01, validation_loss=3.0
    )
    for run, figures_of, kind in (
        (tuning_run, curves.figures_of, "tuning"),
        (evaluated, scores.figures_of, "evaluation"),
    ):
        url = f"/api/v1/{kind}-runs/{run.pk}/tensorboard/"
        client.force_login(member)
        assert url in text_of(
            client.get(f"/{'tuning' if kind == 'tuning' else 'evaluations'}/{run.pk}/")
        )
        answer = client.get(url)
        assert ".tfevents." in answer["Content-Disposition"]
        expected = [(each.tag, each.step) for each in figures_of(run)]
        assert [point[:2] for point in scalars(answer.content)] == expected and expected
        client.force_login(other_member)
        assert client.get(url).status_code == 404
    found = {(each.tag, each.step): each.value for each in curves.figures_of(tuning_run)}
    assert found["train/loss", 30] == 2.5 and found["validation/loss", 40] == 3.0
    assert ("train/loss", 40) not in found  # what is not finite is no point of a curve


class Mlflow(BaseHTTPRequestHandler):
    """What of MLflow's REST API is asked here. `heard`: (path, body or query)."""

    heard: list = []
    known = False
    broken = False

    def log_message(self, *arguments):
        pass

    def answer(self, status, told):
        content = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.heard.append((urlsplit(self.path).path[len(API) :], urlsplit(self.path).query))
        if not self.known:
            return self.answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST"})
        self.answer(200, {"experiment": {"experiment_id": "3"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.heard.append((self.path[len(API) :], body))
        if self.broken:
            return self.answer(500, {"message": "no room"})
        self.answer(200, {"experiment_id": "3", "run": {"info": {"run_id": "abc"}}})


@pytest.fixture
def server(settings):
    class Handler(Mlflow):
        heard: list = []

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        settings.MLFLOW_URL = f"http://127.0.0.1:{served.server_port}/"
        yield Handler
        served.shutdown()


@pytest.fixture
def carried_out(monkeypatch, tuning_run):
    """Carries out a run whose work is done at once, with figures; its row."""

    class Done(RunWork):
        model = type(tuning_run)

        def work(self, heartbeat):
            pass

        def figures(self):
            return [Figure("train/loss", step, 1.0, 1e9) for step in range(2500)]

    monkeypatch.setattr(process, "work_of", lambda kind: Done)
    monkeypatch.setattr(process, "run_work", lambda work, token: Run.Status.SUCCEEDED)

    def carry_out():
        process.carry_out(tuning_run.pk, "", print)
        return Run.objects.get(pk=tuning_run.pk)

    return carry_out


def test_an_mlflow_server_is_told_recipe_and_figures(server, carried_out, client, member):
    Run.objects.update(recipe={"max_steps": 3, "dataset": {"name": "衣服", "rows": 5}})
    run = carried_out()
    paths = [path for path, _body in server.heard]
    assert paths == [
        "experiments/get-by-name", "experiments/create", "runs/create",
        "runs/log-batch", *["runs/log-batch"] * 3, "runs/update",
    ]  # fmt: skip
    params = {each["key"]: each["value"] for each in server.heard[3][1]["params"]}
    assert params == {"max_steps": "3", "dataset.name": "衣服", "dataset.rows": "5"}
    batches = [body["metrics"] for path, body in server.heard[4:7]]
    assert [len(batch) for batch in batches] == [1000, 1000, 500]
    assert batches[0][1] == {"key": "train/loss", "value": 1.0, "step": 1, "timestamp": 10**12}
    assert server.heard[-1][1]["status"] == "FINISHED"
    assert run.tracking["url"].endswith("/#/experiments/3/runs/abc")
    client.force_login(member)
    assert run.tracking["url"] in text_of(client.get(f"/tuning/{run.pk}/"))
    server.known = True
    assert "error" not in carried_out().tracking and "experiments/create" not in [
        path for path, _body in server.heard[len(paths) :]
    ]


@pytest.mark.parametrize("fault", ["away", "broken", "no address"])
def test_one_that_does_not_answer_changes_nothing_but_a_line_on_the_page(
    server, carried_out, settings, fault, client, member
):
    if fault == "broken":
        server.known, server.broken = True, True
    else:
        settings.MLFLOW_URL = "http://127.0.0.1:9" if fault == "away" else "http://["
    before = Run.objects.values("status", "error").get()
    run = carried_out()
    assert Run.objects.values("status", "error").get() == before
    assert set(run.tracking) == {"error"}
    client.force_login(member)
    client.cookies["django_language"] = "en"
    assert "MLflow server did not take" in text_of(client.get(f"/tuning/{run.pk}/"))


def test_nothing_is_sent_where_none_is_configured(server, carried_out, settings):
    settings.MLFLOW_URL = ""
    assert carried_out().tracking == {} and server.heard == []
