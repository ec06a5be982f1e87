"""/v1/batches: from the file to the files of answers, stopped and gone on with on the way."""

import json
from datetime import timedelta

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.utils import timezone

from chat.batches import lines, work
from chat.engine.request import RequestRefused
from chat.models import ApiFile, BatchRun
from portal.budget import ledger
from portal.budget.pricing import MICRO
from portal.models import Run, TokenUsage
from portal.runs import lifecycle
from portal.runs.heartbeat import CANCEL, STEP_ASIDE
from portal.runs.process import run_work
from portal.runs.work import work_of

pytestmark = pytest.mark.django_db(transaction=True)
JSON = "application/json"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def line(number, url=CHAT, **body):
    asked = {"model": "base", "messages": [{"role": "user", "content": f"问{number}"}], **body}
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": asked}


def send(client, *sent, purpose="batch"):
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in sent)
    file = SimpleUploadedFile("asked.jsonl", text.encode())
    return client.post("/v1/files", {"purpose": purpose, "file": file})


def start(client, *sent, endpoint=CHAT, **more):
    body = {"input_file_id": send(client, *sent).json()["id"], "endpoint": endpoint}
    return client.post("/v1/batches", {"completion_window": "24h", **body, **more}, JSON)


def carried_out(id, monkeypatch=None, stop=None):
    """The queue's part. stop: what is asked for before the first line."""
    run_id = int(id.removeprefix("batch_"))
    token = lifecycle.claim(run_id)
    made = work_of("batch")(run_id, print)
    if stop:
        answer_all = made._answer_all

        async def stopped(heartbeat):
            heartbeat.stop_requested = stop
            return await answer_all(heartbeat)

        made._answer_all = stopped
    return run_work(made, token)


def content(client, id):
    response = client.get(f"/v1/files/{id}/content")
    return [json.loads(text) for text in b"".join(response.streaming_content).splitlines()]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(work, "LOOK", 0.01)
    monkeypatch.setattr(work, "PAUSE", 0.01)


def test_every_line_is_answered_as_its_door_would(client, base, router, member):
    sent = [line(1), line(2, model="nobody"), line(3, stream=True), line(4, temperature=9)]
    begun = start(client, *sent, metadata={"of": "tests"}).json()
    assert (begun["status"], begun["object"], begun["output_file_id"]) == (
        "validating",
        "batch",
        None,
    )
    assert carried_out(begun["id"]) == "succeeded"
    batch = client.get(f"/v1/batches/{begun['id']}").json()
    assert batch["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
    assert (batch["status"], batch["metadata"]) == ("completed", {"of": "tests"})
    answers = {each["custom_id"]: each for each in content(client, batch["output_file_id"])}
    assert answers.keys() == {"line-1", "line-3"}
    body = answers["line-1"]["response"]["body"]
    assert body["choices"][0]["message"]["content"] == "你好"
    assert (answers["line-1"]["response"]["status_code"], body["object"]) == (
        200,
        "chat.completion",
    )
    failed = {each["custom_id"]: each for each in content(client, batch["error_file_id"])}
    told = {id: each["response"] for id, each in failed.items()}
    assert {id: each["status_code"] for id, each in told.items()} == {"line-2": 404, "line-4": 400}
    assert told["line-4"]["body"]["error"]["param"] == "temperature"
    usage = TokenUsage.objects.get(user=member, door="batch")
    assert (usage.prompt_tokens, usage.completion_tokens, usage.answers) == (10, 4, 2)
    listed = client.get("/v1/batches").json()
    assert [each["id"] for each in listed["data"]] == [batch["id"]]


def test_texts_are_batched_too(client, base, router):
    sent = line(1, TEXT, prompt="从前")
    begun = start(client, sent, endpoint=TEXT).json()
    carried_out(begun["id"])
    batch = client.get(f"/v1/batches/{begun['id']}").json()
    (answer,) = content(client, batch["output_file_id"])
    assert answer["response"]["body"]["choices"][0]["text"] == "你好"


def test_a_batch_costs_half_and_is_refused_its_lines_when_the_units_are_used_up(
    settings, client, base, router, member
):
    settings.TOKEN_RATE = 1000 * MICRO  # a unit a token; an answer has 7
    ledger.grant(None, member, 7 * MICRO, timezone.now() + timedelta(days=9))
    begun = start(client, line(1), line(2)).json()
    carried_out(begun["id"])
    assert ledger.left(member) == 0  # both answers, of seven tokens each
    begun = start(client, line(3)).json()
    carried_out(begun["id"])
    batch = client.get(f"/v1/batches/{begun['id']}").json()
    (refused,) = content(client, batch["error_file_id"])
    assert refused["response"]["status_code"] == 429
    assert refused["response"]["body"]["error"]["code"] == "insufficient_quota"


def test_a_batch_that_lost_its_process_does_no_line_twice(client, base, router):
    """Killed while it wrote: the torn line is written anew, what is whole stays."""
    begun = start(client, *map(line, range(6))).json()
    run = BatchRun.objects.get()
    run.folder.mkdir(parents=True)
    whole = [json.dumps(lines.result(f"line-{i}", 200, {"first": i})) + "\n" for i in (0, 3)]
    torn = json.dumps(lines.result("line-1", 200, {"first": 1}))[:40]
    work.output_path(run).write_text("".join(whole) + torn)
    assert carried_out(begun["id"]) == "succeeded"
    batch = client.get(f"/v1/batches/{begun['id']}").json()
    answers = content(client, batch["output_file_id"])
    assert sorted(each["custom_id"] for each in answers) == [f"line-{i}" for i in range(6)]
    assert [each["response"]["body"].get("first") for each in answers[:2]] == [0, 3]
    assert len(router.requests) == 4


def test_stepping_aside_and_cancelling_keep_what_is_done(client, base, router):
    begun = start(client, line(1), line(2)).json()
    run = BatchRun.objects.get()
    assert carried_out(begun["id"], stop=STEP_ASIDE) == "queued"
    assert client.get(f"/v1/batches/{begun['id']}").json()["status"] == "in_progress"
    work.output_path(run).write_text(json.dumps(lines.result("line-1", 200, {})) + "\n")
    assert carried_out(begun["id"], stop=CANCEL) == "cancelled"
    batch = client.get(f"/v1/batches/{begun['id']}").json()
    assert (batch["status"], len(content(client, batch["output_file_id"]))) == ("cancelled", 1)
    again = client.post(f"/v1/batches/{begun['id']}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "invalid_state")


def test_a_waiting_batch_is_cancelled_at_once_a_running_one_soon(client, base):
    begun = start(client, line(1)).json()
    assert client.post(f"/v1/batches/{begun['id']}/cancel").json()["status"] == "cancelled"
    begun = start(client, line(1)).json()
    lifecycle.claim(int(begun["id"].removeprefix("batch_")))
    assert client.post(f"/v1/batches/{begun['id']}/cancel").json()["status"] == "cancelling"


def test_after_a_day_the_rest_is_told_as_expired(client, base, router):
    begun = start(client, line(1), line(2)).json()
    BatchRun.objects.update(created_at=timezone.now() - timedelta(hours=25))
    assert carried_out(begun["id"]) == "failed"
    batch = client.get(f"/v1/batches/{begun['id']}").json()
    assert (batch["status"], batch["output_file_id"]) == ("expired", None)
    codes = {each["error"]["code"] for each in content(client, batch["error_file_id"])}
    assert codes == {"batch_expired"} and batch["request_counts"]["failed"] == 2


@pytest.mark.parametrize(
    ("sent", "code", "number"),
    [
        (["{"], "invalid_json_line", 1),
        ([line(1), "", line(1)], "duplicate_custom_id", 3),
        ([line(1), {**line(2), "custom_id": 7}], "invalid_custom_id", 2),
        ([{**line(1), "method": "GET"}], "invalid_method", 1),
        ([line(1, TEXT)], "mismatched_endpoint", 1),
        ([{**line(1), "body": "x"}], "invalid_request", 1),
        ([], "empty_file", None),
    ],
)
def test_a_bad_file_fails_with_its_lines(client, base, router, sent, code, number):
    begun = start(client, *sent or [" "]).json()
    assert carried_out(begun["id"]) == "failed"
    batch = client.get(f"/v1/batches/{begun['id']}").json()
    (problem,) = batch["errors"]["data"]
    assert (batch["status"], problem["code"], problem["line"]) == ("failed", code, number)
    assert not router.requests


def test_a_worker_that_is_full_or_away_is_waited_for(client, base, router):
    tries, submit = [], router.submit

    async def refused_at_first(request, checkpoint):
        tries.append(request)
        if len(tries) < 3:
            raise RequestRefused("queue_full", "full")
        await submit(request, checkpoint)

    router.submit = refused_at_first
    begun = start(client, line(1)).json()
    assert carried_out(begun["id"]) == "succeeded" and len(tries) == 3


def test_people_come_first():
    """No line begins while somebody waits, and a quarter of the rows stays free."""
    worker = {"state": "ready", "max_rows": 8, "queue": 0, "active_rows": 0}
    assert work.room([worker], 0) == 6
    assert work.room([{**worker, "active_rows": 5}], 3) == 1
    assert work.room([{**worker, "active_rows": 8}], 0) < 0
    assert work.room([{**worker, "queue": 1}], 0) == 0
    assert work.room([{**worker, "state": "loading"}], 0) == 0
    assert work.room([{**worker, "max_rows": 1}], 0) == 1
    assert work.room([{"state": "ready"}], 3) == 1  # another's server


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"input_file_id": "file-1"}, "input_file_id"),
        ({"input_file_id": None}, "input_file_id"),
    ],
)
def test_a_bad_batch_is_a_400_that_names_the_parameter(client, base, body, param):
    response = start(client, line(1), **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_other_peoples_batches_and_files_are_not_there(client, other_client, base, router):
    begun = start(client, line(1)).json()
    carried_out(begun["id"])
    output = client.get(f"/v1/batches/{begun['id']}").json()["output_file_id"]
    for path in (
        f"/v1/batches/{begun['id']}",
        f"/v1/files/{output}",
        f"/v1/files/{output}/content",
    ):
        assert other_client.get(path).status_code == 404
    assert other_client.post(f"/v1/batches/{begun['id']}/cancel").status_code == 404
    assert other_client.get("/v1/batches").json()["data"] == []
    theirs = {"input_file_id": begun["input_file_id"], "endpoint": CHAT}
    refused = other_client.post("/v1/batches", {"completion_window": "24h", **theirs}, JSON)
    assert refused.status_code == 400


def test_files_are_listed_by_purpose_and_deleted(client, base, router):
    kept = send(client, line(1)).json()
    assert (kept["purpose"], kept["filename"], kept["status"]) == (
        "batch",
        "asked.jsonl",
        "processed",
    )
    assert [each["id"] for each in client.get("/v1/files?purpose=batch").json()["data"]] == [
        kept["id"]
    ]
    assert client.get("/v1/files?purpose=batch_output").json()["data"] == []
    assert [each["id"] for each in client.get("/v1/files").json()["data"]] == [kept["id"]]
    assert client.get(f"/v1/files/{kept['id']}").json()["bytes"] == kept["bytes"]
    path = ApiFile.objects.get().path
    assert client.delete(f"/v1/files/{kept['id']}").json()["deleted"] and not path.exists()
    begun = start(client, line(1)).json()
    assert client.delete(f"/v1/files/{begun['input_file_id']}").status_code == 409
    assert Run.objects.filter(kind="batch").count() == 1
