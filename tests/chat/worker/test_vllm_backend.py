"""A vLLM server as a worker, by settings alone. The server here speaks as a real one was recorded
to; tests/vllm/ asks a real one.
"""

import asyncio
import itertools
import json
import shlex
from io import StringIO

import pytest
import pytest_asyncio
import torch
from django.core.management import CommandError, call_command

from chat.checkpoints.describe import fingerprint
from chat.engine.adapters import KVPrefix, save
from chat.engine.prompt_process import load_prompter
from chat.engine.request import AdapterRef, Request, RequestRefused, SamplingParams
from chat.models import Checkpoint
from chat.registry import STARTER_FOLDER
from chat.worker.openai_backend import OpenAIBackend
from chat.worker.prompt_renderer import PromptRenderer
from chat.worker.router import CheckpointRef, Router, WorkerUnavailable
from tests.support.completions_server import KEY, CompletionsServer
from tests.support.live_portal import free_port

in_one_loop = pytest.mark.asyncio(loop_scope="module")
numbers = itertools.count()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """vLLM's folder, with one adapter of the starter in it."""
    folder = tmp_path_factory.mktemp("adapters")
    made = KVPrefix(torch.zeros(4, 2, 4, 3, 48), True, fingerprint(STARTER_FOLDER))
    (folder / "new").rename(folder / save(made, folder / "new"))
    return folder


@pytest.fixture(scope="module")
def adapter(adapters):
    (folder,) = adapters.iterdir()
    return AdapterRef(folder.name, str(folder))


@pytest.fixture(scope="module")
def server(adapters):
    with CompletionsServer(fingerprint(STARTER_FOLDER), adapters) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def renderer():
    """One for all tests: its start is a few seconds of imports."""
    renderer = PromptRenderer()
    yield renderer
    await renderer.close()


@pytest_asyncio.fixture(loop_scope="module")
async def router(server, renderer):
    router = Router([f"vllm+{server.url}"], KEY, renderer=renderer)
    yield router
    await router.close()


@pytest.fixture(scope="module")
def checkpoint():
    return CheckpointRef("starter", fingerprint(STARTER_FOLDER), str(STARTER_FOLDER))


def ask(content="hello", **fields) -> Request:
    return Request(f"vllm-{next(numbers)}", ({"role": "user", "content": content},), **fields)


def ids(*prompt, tokens=None, **fields) -> Request:
    sampling = fields.pop("sampling", SamplingParams(max_new_tokens=tokens))
    return Request(f"vllm-{next(numbers)}", prompt_ids=prompt, sampling=sampling, **fields)


async def read(router, id):
    async with asyncio.timeout(20):
        return [event async for events in router.events(id) for event in events]


def written(events) -> str:
    return "".join(event.data["text"] for event in events if event.type == "delta")


@in_one_loop
async def test_messages_go_there_as_the_engine_would_read_them(router, server, checkpoint):
    """Also where a user spells a control token: it stays text."""
    request = ask("what is <|im_end|> for?", sampling=SamplingParams(max_new_tokens=3))
    await router.submit(request, checkpoint)
    events = await read(router, request.id)
    sent, prompter = server.ask("last"), load_prompter(STARTER_FOLDER)
    assert sent["prompt"] == prompter.prompt_ids(request.messages)
    assert sent["stop_token_ids"] == sorted(prompter.end_ids)
    assert "kv_transfer_params" not in sent
    assert events[0].type == "started"
    assert written(events) == "a b c "
    assert events[-1].data["finish_reason"] == "length"
    usage = {"prompt_tokens": len(sent["prompt"]), "completion_tokens": 3}
    assert events[-1].data["usage"] == usage | {"total_tokens": len(sent["prompt"]) + 3}


@in_one_loop
async def test_a_text_to_be_gone_on_with_goes_there_without_a_template(router, server, checkpoint):
    request = Request("vllm-text", text="hello", sampling=SamplingParams(max_new_tokens=1))
    await router.submit(request, checkpoint)
    assert written(await read(router, request.id)) == "a "
    assert server.ask("last")["prompt"] == load_prompter(STARTER_FOLDER).plain_ids("hello")


@in_one_loop
async def test_an_adapter_is_placeholders_that_nobody_pays_for(router, server, checkpoint, adapter):
    request = ids(7, 8, 9, tokens=2, adapter=adapter)
    await router.submit(request, checkpoint)
    events = await read(router, request.id)
    sent = server.ask("last")
    assert sent["prompt"] == [7, 7, 7, 7, 8, 9]
    assert sent["kv_transfer_params"] == {"prefix": adapter.name, "length": 3}
    assert sent["cache_salt"] == adapter.name
    assert events[-1].data["usage"]["prompt_tokens"] == 3


@in_one_loop
async def test_a_prefix_acts_there_as_it_was_trained_or_not_at_all(
    router, server, checkpoint, adapter
):
    weak = ids(8, 9, adapter=adapter, sampling=SamplingParams(prefix_strength=0.5))
    with pytest.raises(RequestRefused) as refusal:
        await router.submit(weak, checkpoint)
    assert refusal.value.param == "prefix_strength"
    off = ids(8, 9, adapter=adapter, sampling=SamplingParams(prefix_strength=0))
    await router.submit(off, checkpoint)
    await read(router, off.id)
    assert "kv_transfer_params" not in server.ask("last")


@in_one_loop
async def test_sampling_goes_there(router, server, checkpoint):
    sampling = SamplingParams(
        temperature=0.4, top_p=0.5, top_k=0, repetition_penalty=1.2, stop=("x",), seed=11
    )
    request = ids(7, 8, sampling=sampling)
    await router.submit(request, checkpoint)
    await read(router, request.id)
    sent = server.ask("last")
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed", "max_tokens")
    # what the context of 64 leaves
    assert [sent[name] for name in names] == [0.4, 0.5, 0, 1.2, ["x"], 11, 62]
    greedy = ids(7, 8, sampling=SamplingParams(do_sample=False, max_new_tokens=1))
    await router.submit(greedy, checkpoint)
    await read(router, greedy.id)
    assert server.ask("last")["temperature"] == 0


@in_one_loop
async def test_logprobs_have_the_form_of_a_workers(router, checkpoint):
    request = ids(7, 8, sampling=SamplingParams(max_new_tokens=1, logprobs=2))
    await router.submit(request, checkpoint)
    (delta,) = [event for event in await read(router, request.id) if event.type == "delta"]
    (entry,) = delta.data["logprobs"]
    assert delta.data["tokens"] == 1
    assert (entry["token"], entry["token_id"], entry["logprob"]) == ("a ", 97, -0.5)
    assert entry["bytes"] == [97, 32]
    assert [other["token"] for other in entry["top_logprobs"]] == ["a ", "other"]


@in_one_loop
async def test_an_abort_ends_the_answer_there_too(router, server, checkpoint):
    request = ids(7, 2001, tokens=60)
    await router.submit(request, checkpoint)
    events = router.events(request.id)
    seen = list(await anext(events))
    await router.abort(request.id)
    async with asyncio.timeout(5):
        async for news in events:
            seen += news
    assert seen[-1].data["finish_reason"] == "abort"
    async with asyncio.timeout(5):
        while not await asyncio.to_thread(server.ask, "aborted"):
            await asyncio.sleep(0.05)


@in_one_loop
async def test_what_does_not_fit_is_refused_before_the_server_is_asked(router, checkpoint, adapter):
    for request, code in [
        (ids(*range(7, 71), tokens=5), "context_length_exceeded"),
        # 64 hold 61 beside the adapter
        (ids(*range(7, 68), tokens=5, adapter=adapter), "context_length_exceeded"),
        (ids(tokens=5), "empty_prompt"),
        (ask(" "), "empty_prompt"),
        (ids(7, sampling=SamplingParams(temperature=-1)), "invalid_value"),
    ]:
        with pytest.raises(RequestRefused) as refusal:
            await router.submit(request, checkpoint)
        assert refusal.value.code == code


@in_one_loop
async def test_more_tokens_than_fit_beside_prompt_and_adapter_are_cut(
    router, server, checkpoint, adapter
):
    request = ids(7, 8, tokens=4096, adapter=adapter)
    await router.submit(request, checkpoint)
    await router.abort(request.id)
    assert server.ask("last")["max_tokens"] == 59


@in_one_loop
@pytest.mark.parametrize(("last", "code"), [(2003, "invalid_value"), (2004, "queue_full")])
async def test_its_refusals_are_ours(router, checkpoint, last, code):
    with pytest.raises(RequestRefused) as refusal:
        await router.submit(ids(7, last, tokens=5), checkpoint)
    assert refusal.value.code == code


@in_one_loop
async def test_an_adapter_that_does_not_fit_or_is_not_there(router, checkpoint, adapter, tmp_path):
    other = KVPrefix(torch.zeros(4, 2, 4, 3, 48), True, "f" * 64)
    unshifted = KVPrefix(torch.zeros(4, 2, 4, 3, 48), False, "")
    for number, prefix in enumerate((other, unshifted)):
        save(prefix, tmp_path / str(number))
    for folder in (*tmp_path.iterdir(), tmp_path / "none"):
        with pytest.raises(RequestRefused) as refusal:
            await router.submit(ids(7, adapter=AdapterRef(folder.name, str(folder))), checkpoint)
        assert refusal.value.code == "invalid_adapter"
    # The portal has it, the server's folder does not: an error, and no answer without it.
    request = ids(7, tokens=3, adapter=AdapterRef("9" * 64, adapter.folder))
    await router.submit(request, checkpoint)
    events = await read(router, request.id)
    assert written(events) == ""
    assert (events[-1].type, events[-1].data["error"]["code"]) == ("failed", "upstream_error")


@in_one_loop
async def test_a_server_without_the_connector_gets_no_adapters(renderer, checkpoint, adapter):
    """It would answer as the bare model, and nobody would see it."""
    server = CompletionsServer(fingerprint(STARTER_FOLDER))
    router = Router([f"plain=vllm+{server.url}"], KEY, renderer=renderer)
    try:
        with pytest.raises(WorkerUnavailable, match="without vllm_prefix"):
            await router.submit(ids(7, adapter=adapter), checkpoint)
        request = ids(7, tokens=2)
        await router.submit(request, checkpoint)
        assert written(await read(router, request.id)) == "a b "
    finally:
        await router.close()
        server.kill()


@in_one_loop
async def test_a_server_that_is_killed_costs_its_answers_and_no_others(
    renderer, adapters, checkpoint
):
    servers = [CompletionsServer(fingerprint(STARTER_FOLDER), adapters) for _ in range(2)]
    router = Router([f"vllm+{server.url}" for server in servers], KEY, renderer=renderer)
    try:
        running = [ids(7, 2001, tokens=60) for _ in servers]
        for request in running:
            await router.submit(request, checkpoint)
        # the least busy gets it: one each
        assert sorted(backend.load() for backend in router.backends) == [1, 1]
        first, second = (router.events(request.id) for request in running)
        await anext(first), await anext(second)
        home = router.backend_of(running[0].id)
        killed = next(server for server in servers if server.url in home.url)
        killed.kill()
        async with asyncio.timeout(20):
            lost = [event async for events in first for event in events]
            kept = [event async for events in second for event in events]
        assert (lost[-1].type, lost[-1].data["error"]["code"]) == ("failed", "upstream_error")
        assert kept[-1].type == "finished"
        later = [ids(7, tokens=2) for _ in range(3)]
        for request in later:
            await router.submit(request, checkpoint)
            assert written(await read(router, request.id)) == "a b "
    finally:
        await router.close()
        for server in servers:
            server.kill()


@in_one_loop
async def test_who_serves_what(router, server, checkpoint):
    (status,) = await router.status()
    assert (status["state"], status["checkpoint"]) == ("ready", "the-model")
    with pytest.raises(WorkerUnavailable) as refusal:
        await router.submit(ids(7), CheckpointRef("other", "0" * 64))
    assert refusal.value.code == "no_worker_for_checkpoint"
    wrong = Router([f"vllm+{server.url}", f"vllm+http://127.0.0.1:{free_port()}"], "another key")
    states = await wrong.status()
    assert [state["state"] for state in states] == ["unavailable"] * 2
    assert "401" in states[0]["reason"]
    await wrong.close()


@in_one_loop
async def test_a_stream_that_breaks_off_fails_with_what_was_written(router, checkpoint):
    request = ids(7, 2002, tokens=5)
    await router.submit(request, checkpoint)
    events = await read(router, request.id)
    assert written(events) == "a "
    assert (events[-1].type, events[-1].data["error"]["code"]) == ("failed", "upstream_error")


@in_one_loop
async def test_a_renderer_that_dies_is_started_again(server, checkpoint):
    router = Router([f"vllm+{server.url}"], KEY)
    for _ in range(2):
        request = ask(sampling=SamplingParams(max_new_tokens=2))
        await router.submit(request, checkpoint)
        assert written(await read(router, request.id)) == "a b "
        process = router._own_renderer._process
        process.kill()
        await process.wait()
    await router.close()


@in_one_loop
async def test_a_folder_without_a_tokenizer_is_named(router, checkpoint, tmp_path):
    lost = CheckpointRef(checkpoint.name, checkpoint.fingerprint, str(tmp_path))
    with pytest.raises(WorkerUnavailable, match="no prompts can be made for"):
        await router.submit(ask(), lost)


def test_the_portal_tells_its_health(client, db, settings, server):
    settings.WORKER_URLS, settings.WORKER_TOKEN = [f"gpu=vllm+{server.url}"], KEY
    report = client.get("/healthz").json()
    assert report["worker"]["state"] == "ready"
    assert report["worker"]["checkpoint"] == "the-model"


def test_the_command_names_checkpoint_adapters_and_key(db, settings, tmp_path):
    settings.DATA_DIR = tmp_path
    Checkpoint.objects.create(name="big", path="/models/big one", fingerprint="e" * 64)
    out = StringIO()
    call_command("vllm_command", "big", "--port", "8001", stdout=out)
    variables, command = out.getvalue().split(" python ")
    words = shlex.split(command)
    at = {word: words[place + 1 :] for place, word in enumerate(words) if word.startswith("--")}
    assert at["--model"][0] == "/models/big one"
    assert at["--served-model-name"][:2] == ["big", "e" * 64]
    assert at["--port"][0] == "8001"
    transfer = json.loads(at["--kv-transfer-config"][0])
    assert transfer["kv_connector_extra_config"]["folder"] == str(tmp_path / "adapters")
    assert transfer["kv_load_failure_policy"] == "fail"
    assert (tmp_path / "adapters").is_dir()
    assert "VLLM_API_KEY=" in variables
    with pytest.raises(CommandError, match="small"):
        call_command("vllm_command", "small")


def test_a_folder_that_cannot_be_loaded_here_has_its_command_too(db, tmp_path, settings):
    """What the refusal of a hybrid model advises."""
    folder = tmp_path / "qwen3-next"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "qwen3_next", "full_attention_interval": 4}'
    )
    out, err = StringIO(), StringIO()
    call_command("vllm_command", str(folder), "--port", "8001", stdout=out, stderr=err)
    words = shlex.split(out.getvalue())
    assert words[words.index("--model") + 1] == str(folder)
    assert "--kv-transfer-config" not in words
    entry = shlex.split(err.getvalue())[-1].partition("PORTAL_UPSTREAMS=")[2]
    backend = OpenAIBackend.parse(entry, "")
    assert (backend.checkpoint, backend.url) == ("qwen3-next", "http://127.0.0.1:8001/v1")
