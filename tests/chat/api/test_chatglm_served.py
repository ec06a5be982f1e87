"""A ChatGLM folder in the official layout through the ordinary doors: registered, served, with
prefixes of upstream's scripts.
"""

import shutil
from pathlib import Path

import openai
import pytest

from tests.support.live_portal import Portal, finished, upload, wait_for
from tests.support.tiny_chatglm import DATA, tiny_folder

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("web")]


@pytest.fixture(scope="module")
def portal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatglm")
    with Portal(folder / "data") as running:
        wait_for(lambda: running.healthy(worker=False), 60, "the web process")
        running.manage(
            "add_checkpoint",
            str(tiny_folder(folder / "tiny")),
            "--name",
            "tiny-chatglm",
            "--default",
        )
        for kind in ("prefix_noproj", "prefix_proj"):
            checkpoint = folder / kind / "checkpoint-30"  # as train.sh names it
            shutil.copytree(Path(DATA, kind), checkpoint)
            running.manage(
                "import_adapter", str(checkpoint), "--checkpoint", "tiny-chatglm", "--name", kind
            )
        wait_for(
            lambda: (running.healthy() or {}).get("worker", {}).get("checkpoint") == "tiny-chatglm",
            120,
            "the worker",
        )
        yield running


@pytest.fixture(scope="module")
def key(portal):
    return portal.manage("create_api_key", "admin").strip()


def test_the_tutorials_request_is_answered(portal, key):
    status, reply = portal.call(
        "POST", "/", {"prompt": "你好", "history": [], "max_length": 20}, key=key
    )
    assert status == 200 and reply["history"] == [["你好", reply["response"]]]
    status, reply = portal.call(
        "POST", "/", {"prompt": "你好", "history": reply["history"]}, key=key
    )
    assert status == 200 and len(reply["history"]) == 2


def test_every_prefix_answers_in_its_own_way_and_off_is_the_base(portal, key):
    client = openai.OpenAI(base_url=f"{portal.url}/v1", api_key=key)
    names = ["tiny-chatglm", "prefix_noproj", "prefix_proj", "tiny-chatglm"]
    answers = [
        client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "你好"}],
            temperature=0,
            max_tokens=16,
            logprobs=True,
        ).choices[0]
        for name in names
    ]
    first = [answer.logprobs.content[0].logprob for answer in answers]
    assert (
        first[0] == pytest.approx(first[3], abs=1e-5)
        and len({round(value, 4) for value in first}) == 3
    )


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(portal, key):
    status, body = portal.call("POST", "/", {"prompt": "好" * 500}, key=key)
    assert (
        status == 400
        and body["error"]["code"] == "context_length_exceeded"
        and "128" in body["error"]["message"]
    )


def test_it_is_tuned_evaluated_and_chats_with_its_own_adapter(portal, key):
    rows = [{"prompt": f"颜色 {number}", "response": "红色的裙子"} for number in range(12)]
    status, dataset = upload(
        portal, key, rows, name="colours", prompt_column="prompt", response_column="response"
    )
    assert status == 201, dataset
    checkpoints = portal.get("/api/v1/checkpoints/", key=key)[1]["results"]
    tiny = next(checkpoint for checkpoint in checkpoints if checkpoint["name"] == "tiny-chatglm")
    plan = {
        "dataset": dataset["id"],
        "checkpoint": tiny["id"],
        "name": "colours-v1",
        "max_steps": 4,
        "pre_seq_len": 8,
        "max_source_length": 32,
        "max_target_length": 32,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    }
    status, run = portal.call("POST", "/api/v1/tuning-runs/", plan, key=key)
    assert status == 201, run
    run = finished(portal, key, f"/api/v1/tuning-runs/{run['id']}/", 120)
    assert run["status"] == "succeeded" and run["step"] == 4, run

    wish = {
        "dataset": dataset["id"],
        "checkpoint": tiny["id"],
        "adapter": run["adapter"],
        "max_examples": 4,
    }
    status, evaluation = portal.call("POST", "/api/v1/evaluation-runs/", wish, key=key)
    assert status == 201, evaluation
    evaluation = finished(portal, key, f"/api/v1/evaluation-runs/{evaluation['id']}/", 180)
    assert evaluation["status"] == "succeeded" and set(evaluation["scores"]) >= {
        "rouge-l",
        "bleu-4",
    }, evaluation

    status, reply = portal.call(
        "POST", "/", {"prompt": "颜色 1", "model": "colours-v1", "max_length": 40}, key=key
    )
    assert status == 200, reply
