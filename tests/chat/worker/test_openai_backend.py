"""A base checkpoint that an OpenAI-compatible server serves, by settings alone."""

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from chat.engine.request import AdapterRef, Request, RequestRefused, SamplingParams
from chat.worker.openai_backend import OpenAIBackend
from chat.worker.router import CheckpointRef, Router, SequenceLost, WorkerUnavailable
from tests.support import ROOT
from tests.support.live_portal import free_port
from tests.support.openai_server import QUIRKS

BROKEN = ["error", "garbage", "cut"]
CHECKPOINT = CheckpointRef("big", "0" * 64)
numbers = itertools.count()


@pytest.fixture(scope="module")
def server():
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.openai_server", str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "listening\n"
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
async def router(server):
    router = Router([], "", [f"big={server}|big-model"], "the-key")
    yield router
    await router.close()


def ask(content, **fields) -> Request:
    return Request(f"upstream-{next(numbers)}", ({"role": "user", "content": content},), **fields)


async def read(router, id, after=0):
    async with asyncio.timeout(10):
        return [event async for events in router.events(id, after) for event in events]


def written(events) -> str:
    return "".join(event.data["text"] for event in events if event.type == "delta")


async def test_its_stream_becomes_the_same_events_as_a_workers(router):
    request = ask("one two three")
    await router.submit(request, CHECKPOINT)
    events = await read(router, request.id)
    assert written(events) == "one two three "
    assert events[0].type == "started"
    assert events[-1].data["finish_reason"] == "stop"
    assert events[-1].data["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
    }
    assert set(events[-1].data["timings"]) == {
        "queued_s",
        "prefill_s",
        "decode_s",
        "tokens_per_second",
    }
    assert written(await read(router, request.id, after=2)) == "two three "


async def test_the_limit_is_reported_as_length(router):
    request = ask("one", sampling=SamplingParams(max_new_tokens=1))
    await router.submit(request, CHECKPOINT)
    assert (await read(router, request.id))[-1].data["finish_reason"] == "length"


async def test_a_server_that_knows_openais_fields_only_gets_no_others(router):
    request = ask("strict")
    await router.submit(request, CHECKPOINT)
    assert written(await read(router, request.id)) == "strict "


async def test_an_abort_ends_the_stream_there_too(router, server):
    request = ask("slow " + "word " * 400)
    await router.submit(request, CHECKPOINT)
    events = router.events(request.id)
    seen = list(await anext(events))
    await router.abort(request.id)
    async with asyncio.timeout(5):
        async for news in events:
            seen += news
    assert seen[-1].data["finish_reason"] == "abort"

    def aborted():
        with urlopen(f"{server}/aborted") as answer:
            return json.load(answer)

    async with asyncio.timeout(5):
        while not await asyncio.to_thread(aborted):
            await asyncio.sleep(0.05)


async def test_a_stream_that_breaks_off_fails_with_what_was_written(router):
    request = ask("broken off here")
    await router.submit(request, CHECKPOINT)
    events = await read(router, request.id)
    assert written(events) == "broken "
    assert (events[-1].type, events[-1].data["error"]["code"]) == ("failed", "upstream_error")


@pytest.mark.parametrize("name", [name for name in QUIRKS if name not in BROKEN])
async def test_whatever_a_server_invents_the_text_is_kept_and_the_answer_ends(router, name):
    request = ask(f"quirk {name}")
    await router.submit(request, CHECKPOINT)
    events = await read(router, request.id)
    expected = {
        "reasoning": "<think>\nwhy?\n</think>\n\nkept",
        "tools": '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n',
        "long-line": "kept" * 100_000,
    }
    assert written(events) == expected.get(name, "kept")
    assert (events[-1].type, events[-1].data["finish_reason"]) == ("finished", "stop")
    assert events[-1].data["usage"]["completion_tokens"] >= 1


@pytest.mark.parametrize("name", BROKEN)
async def test_a_stream_that_is_broken_fails_with_what_was_written(router, name):
    request = ask(f"quirk {name}")
    await router.submit(request, CHECKPOINT)
    events = await read(router, request.id)
    assert (written(events), events[-1].type) == ("kept", "failed")


async def test_a_server_that_does_not_stream_is_read_too(router):
    request = ask("whole")
    await router.submit(request, CHECKPOINT)
    events = await read(router, request.id)
    assert (written(events), events[-1].data["finish_reason"]) == ("kept", "stop")


async def test_more_tokens_than_the_server_has_are_asked_for_anew_without_a_number(router):
    request = ask("many", sampling=SamplingParams(max_new_tokens=4096))
    await router.submit(request, CHECKPOINT)
    assert written(await read(router, request.id)) == "many "


def test_what_the_sampler_has_is_passed_on():
    sampling = SamplingParams(
        presence_penalty=1, logit_bias=((7, -100.0),), json_schema='{"type": "object"}'
    )
    body = OpenAIBackend("big", "http://x/v1", "m")._body(ask("x", sampling=sampling))
    assert (body["presence_penalty"], body["logit_bias"]) == (1, {"7": -100.0})
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert "frequency_penalty" not in body


@pytest.mark.parametrize(
    ("words", "code"), [("error", "context_length_exceeded"), ("busy", "queue_full")]
)
async def test_its_refusals_are_ours(router, words, code):
    with pytest.raises(RequestRefused) as refusal:
        await router.submit(ask(words), CHECKPOINT)
    assert refusal.value.code == code


async def test_it_takes_no_adapter_and_no_other_checkpoint(router):
    for request, checkpoint in [
        (ask("x", adapter=AdapterRef("a", "/a")), CHECKPOINT),
        (ask("x"), CheckpointRef("other", "0" * 64)),
    ]:
        with pytest.raises(WorkerUnavailable) as refusal:
            await router.submit(request, checkpoint)
        assert refusal.value.code == "no_worker_for_checkpoint"


async def test_a_wrong_key_and_a_server_that_is_not_there(server):
    for entry, key in [
        (f"big={server}|big-model", "wrong"),
        (f"big=http://127.0.0.1:{free_port()}/v1|big-model", ""),
    ]:
        router = Router([], "", [entry], key)
        with pytest.raises(WorkerUnavailable):
            await router.submit(ask("x"), CHECKPOINT)
        with pytest.raises(SequenceLost):
            await read(router, "unknown")
        await router.close()


@pytest.mark.parametrize(
    "entry",
    ["", "big", "big=http://host", "=http://host|m", "big=ftp://host|m", "big=http://host|"],
)
def test_an_entry_that_is_none_is_refused(entry):
    with pytest.raises(ValueError, match="CHECKPOINT_NAME"):
        OpenAIBackend.parse(entry)


@pytest.mark.slow
async def test_against_transformers_serve(tmp_path):
    """The real server of the transformers package, on the starter model."""
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi and uvicorn")
    pytest.importorskip("uvicorn")
    model, port = ROOT / "chat" / "starter" / "model", free_port()
    command = [
        shutil.which("transformers", path=Path(sys.executable).parent),
        "serve",
        "--host",
        "127.0.0.1",
    ]
    with open(tmp_path / "serve.log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)},
        )
    router = Router([], "", [f"big=http://127.0.0.1:{port}|{model}"])
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (URLError, OSError):
                assert process.poll() is None and time.monotonic() < deadline, (
                    tmp_path / "serve.log"
                ).read_text()
                await asyncio.sleep(0.5)
        request = ask("你好", sampling=SamplingParams(do_sample=False, max_new_tokens=20))
        await router.submit(request, CHECKPOINT)
        async with asyncio.timeout(120):
            events = [event async for events in router.events(request.id) for event in events]
        # That server streams the prompt and the special tokens of some tokenizers along with the
        # answer.
        assert "<|assistant|>你好！" in written(events) or written(events).startswith("你好！")
        assert events[-1].data["finish_reason"] in ("stop", "length")
    finally:
        await router.close()
        process.terminate()
        process.wait(20)
