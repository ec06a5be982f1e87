"""The whole loop over REST against the portal as people run it: chat, upload, tune, evaluate, chat
with the tuned model.
"""

import json
import os
import signal
import subprocess

import pytest
from openai import OpenAI

from tests.support import ROOT
from tests.support.live_portal import Portal, finished, upload, wait_for

SAMPLE = ROOT / "chat" / "starter" / "sample"


@pytest.fixture(scope="module")
def portal(tmp_path_factory):
    with Portal(tmp_path_factory.mktemp("loop") / "data") as running:
        wait_for(running.healthy, 60, "the portal with its model")
        yield running


@pytest.fixture(scope="module")
def key(portal):
    return portal.manage("create_api_key", "admin").strip()


def say(portal, key, conversation: int, text: str, **choice) -> dict:
    """Sends a message, reads its event stream to the end, returns the finished answer."""
    status, turn = portal.call(
        "POST",
        f"/api/v1/conversations/{conversation}/messages/",
        {"content": text, **choice},
        key=key,
    )
    assert status == 202, turn
    answer = next(message for message in turn.values() if message["role"] == "assistant")
    status, stream = portal.get(f"/api/v1/messages/{answer['id']}/stream/", key=key)
    frames = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    numbers = [frame["seq"] for frame in frames if "seq" in frame]
    assert numbers == sorted(set(numbers))
    streamed = "".join(frame["text"] for frame in frames if frame["type"] == "message.delta")
    assert frames[-1]["type"] == "message.finished", frames[-1]
    finished = wait_for(
        lambda: next(
            message
            for message in portal.get(f"/api/v1/conversations/{conversation}/messages/", key=key)[
                1
            ]["results"]
            if message["id"] == answer["id"] and message["status"] == "complete"
        ),
        10,
        "the saved answer",
    )
    assert finished["content"] == streamed
    return finished


def test_the_whole_loop(portal, key):
    checkpoints = portal.get("/api/v1/checkpoints/", key=key)[1]["results"]
    starter = checkpoints[0]
    conversation = portal.call("POST", "/api/v1/conversations/", {"title": ""}, key=key)[1]["id"]
    greedy = {"do_sample": False, "max_new_tokens": 48}
    hello = say(portal, key, conversation, "你好", sampling=greedy)
    assert (
        hello["content"].strip()
        and hello["usage"]["completion_tokens"] > 0
        and hello["adapter"] is None
    )

    rows = [
        json.loads(line)
        for line in (SAMPLE / "train.json").read_text(encoding="utf-8").splitlines()[:96]
    ]
    status, dataset = upload(
        portal, key, rows, name="house style", prompt_column="content", response_column="summary"
    )
    assert status == 201 and dataset["status"] == "ready" and dataset["rows"] == 96, dataset

    status, run = portal.call(
        "POST",
        "/api/v1/tuning-runs/",
        {
            "dataset": dataset["id"],
            "checkpoint": starter["id"],
            "name": "first",
            "max_steps": 40,
            "pre_seq_len": 16,
            "learning_rate": 0.3,
            "seed": 1,
        },
        key=key,
    )
    assert status == 201, run
    # the trainer is killed once on the way; the run must come through on its own
    trainer = wait_for(
        lambda: (
            portal.get(f"/api/v1/tuning-runs/{run['id']}/", key=key)[1]["step"] > 5
            and portal.pid_of("portal.runs.process")
        ),
        90,
        "steps",
    )
    os.kill(trainer, signal.SIGKILL)
    run = finished(portal, key, f"/api/v1/tuning-runs/{run['id']}/", 150)
    assert run["status"] == "succeeded" and run["step"] == 40 and run["attempt"] == 2, run
    metrics = portal.get(f"/api/v1/tuning-runs/{run['id']}/metrics/", key=key)[1]
    points = metrics["results"] if isinstance(metrics, dict) else metrics
    assert points[-1]["step"] == 40 and points[-1]["loss"] < points[0]["loss"]
    adapters = portal.get("/api/v1/adapters/", key=key)[1]["results"]
    assert [adapter["tuning_run"] for adapter in adapters] == [run["id"]]
    adapter = adapters[0]
    assert adapter["with_history"] is False, "the sample's rows are single turns"

    status, evaluation = portal.call(
        "POST",
        "/api/v1/evaluation-runs/",
        {
            "dataset": dataset["id"],
            "checkpoint": starter["id"],
            "adapter": adapter["id"],
            "decoding": "greedy",
            "max_examples": 12,
        },
        key=key,
    )
    assert status == 201, evaluation
    evaluation = finished(portal, key, f"/api/v1/evaluation-runs/{evaluation['id']}/", 120)
    assert evaluation["status"] == "succeeded", evaluation
    assert set(evaluation["scores"]) >= {"rouge-1", "rouge-2", "rouge-l", "bleu-4"}
    predictions = portal.get(f"/api/v1/evaluation-runs/{evaluation['id']}/predictions/", key=key)[
        1
    ]["results"]
    assert len(predictions) == 12

    prompt = rows[0]["content"]
    tuned = say(portal, key, conversation, prompt, adapter=adapter["id"], sampling=greedy)
    bare = say(portal, key, conversation, prompt, adapter=None, sampling=greedy)
    assert tuned["with_history"] is False and bare["with_history"] is True
    assert tuned["adapter"] == adapter["id"] and bare["adapter"] is None

    client = OpenAI(base_url=f"{portal.url}/v1", api_key=key)
    ids = {model.id for model in client.models.list()}
    assert {starter["name"], adapter["name"]} <= ids
    # prefix on and off in one process, without any reload: same prompt, different models, different
    # words
    texts = [
        client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=48,
        )
        .choices[0]
        .message.content
        for model in (adapter["name"], starter["name"], f"{starter['name']}:{adapter['name']}")
    ]
    assert texts[0] == texts[2] != texts[1]

    answer = subprocess.run(
        [
            "curl",
            "-sS",
            "-X",
            "POST",
            portal.url,
            "-H",
            "Content-Type: application/json",
            "-H",
            f"Authorization: Bearer {key}",
            "-d",
            '{"prompt": "你好", "history": []}',
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    reply = json.loads(answer)
    assert (
        reply["status"] == 200
        and reply["history"][-1] == ["你好", reply["response"]]
        and reply["time"]
    )


def test_nobody_gets_in_without_a_key(portal):
    paths = [
        "checkpoints",
        "adapters",
        "conversations",
        "datasets",
        "tuning-runs",
        "evaluation-runs",
    ]
    for path in [f"/api/v1/{path}/" for path in paths] + ["/v1/models"]:
        status, body = portal.get(path)
        assert status == 401 and body["error"]["message"], path
    assert (
        portal.call("POST", "/v1/chat/completions", {"model": "starter", "messages": []})[0] == 401
    )
    assert portal.call("POST", "/", {"prompt": "你好"})[0] == 401


def test_the_schema_names_every_resource(portal):
    schema = portal.get("/api/schema/?format=json")[1]
    paths = "\n".join(schema["paths"])
    for resource in (
        "checkpoints",
        "adapters",
        "conversations",
        "messages",
        "datasets",
        "tuning-runs",
        "evaluation-runs",
    ):
        assert f"/api/v1/{resource}/" in paths
