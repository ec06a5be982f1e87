"""The portal with two real vLLM servers and no worker of its own, by settings alone, started by the
command that `vllm_command` prints.
"""

import json

import pytest
import torch
from openai import APIError, OpenAI

from chat.engine.adapters import KVPrefix, save
from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import load
from chat.engine.request import AdapterRef, Request, SamplingParams
from tests.support.live_portal import Portal, finished, free_port, upload, wait_for
from tests.vllm import environment
from tests.vllm.server import VllmServer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(environment.missing()), reason=environment.missing()),
]

TOKEN = "between the portal and its servers"
PUBLISH = """
from chat.models import Checkpoint
from chat.registry import publish_adapter
from portal.models import User
made = publish_adapter({folder!r}, name={name!r}, checkpoint=Checkpoint.objects.get(name="smol"),
    owner=User.objects.get(username="admin"))
print(made.pk, made.sha256)
"""


class Site:
    """The portal, its servers, and the engine whose answers they must give."""

    def __init__(self, folder):
        self.folder = folder
        self.ports = [free_port(), free_port()]
        self.portal = Portal(
            folder / "data",
            PORTAL_WORKERS=",".join(f"vllm+http://127.0.0.1:{port}" for port in self.ports),
            PORTAL_WORKER_TOKEN=TOKEN,
        )
        self.servers: list[VllmServer] = []

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.__exit__()  # nothing may be left running
            raise
        return self

    def start(self):
        self.portal.__enter__()
        wait_for(lambda: self.portal.healthy(worker=False), 300, "the portal")
        model = str(environment.model())
        self.portal.manage("add_checkpoint", model, "--name", "smol", "--default")
        self.key = self.portal.manage("create_api_key", "admin").strip()
        self.servers = [self.server(port) for port in self.ports]
        for server in self.servers:
            server.start()
        for server in self.servers:
            server.wait_until_ready()
        self.engine = Engine(load(model, device="cpu"), EngineConfig(max_rows=4))
        self.client = OpenAI(base_url=f"{self.portal.url}/v1", api_key=self.key, max_retries=0)

    def server(self, port: int) -> VllmServer:
        printed = self.portal.manage(
            "vllm_command", "smol", "--host", "127.0.0.1", "--port", str(port),
            "--python", str(environment.python()),
        )  # fmt: skip
        small = "--dtype float32 --max-model-len 1024 --max-num-seqs 16 --enforce-eager"
        return VllmServer(
            ["sh", "-c", f"{printed.strip()} {small}"],
            self.folder / f"{port}.log",
            port,
            PORTAL_WORKER_TOKEN=TOKEN,
            PYTHONPATH="",
        )

    def __exit__(self, *error):
        for server in self.servers:
            server.stop()
        self.portal.stop()

    def tune(self, name: str, text: str, length: int) -> tuple[int, AdapterRef]:
        """(id, where it is) of a new adapter: keys and values of a text."""
        loaded = self.engine.loaded
        ids = (loaded.tokenizer(text)["input_ids"] * length)[:length]
        with torch.no_grad():
            cache = loaded.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
        tensor = torch.stack(
            [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        )
        folder = self.folder / name
        save(KVPrefix(tensor, True, loaded.fingerprint), folder)
        code = PUBLISH.format(folder=str(folder), name=name)
        pk, sha256 = self.portal.manage("shell", "-v", "0", "-c", code).split()[-2:]
        return int(pk), AdapterRef(sha256, str(self.portal.data_dir / "adapters" / sha256))

    def ours(self, content: str, adapter: AdapterRef | None = None, tokens: int = 24):
        messages = ({"role": "user", "content": content},)
        sampling = SamplingParams(do_sample=False, max_new_tokens=tokens)
        (answer,) = self.engine.generate(
            [Request("1", messages, adapter=adapter, sampling=sampling)]
        )
        return answer

    def theirs(self, content: str, model: str = "smol", tokens: int = 24, **more):
        return self.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": content}], temperature=0,
            max_tokens=tokens, **more,
        )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with Site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="module")
def adapter(site):
    return site.tune("pirate", "You are a pirate captain who answers with sea stories. ", 37)


def test_the_portal_is_healthy_without_a_worker_of_its_own(site):
    report = site.portal.healthy()
    assert (report["status"], report["worker"]["checkpoint"]) == ("ok", "smol")
    assert not any("inference_worker" in line for line in site.portal.processes().values())


def test_answers_are_the_engines_with_an_adapter_that_came_later_and_without(site, adapter):
    for model, ref in (("smol", None), ("smol:pirate", adapter[1])):
        expected = site.ours("What should I eat today?", ref)
        answer = site.theirs("What should I eat today?", model)
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.prompt_tokens == expected.usage["prompt_tokens"]
        assert answer.usage.completion_tokens == expected.usage["completion_tokens"]
        assert answer.choices[0].finish_reason == expected.finish_reason


def test_a_stream_with_logprobs(site, adapter):
    expected = site.ours("Tell me of the sea.", adapter[1])
    chunks = list(
        site.theirs("Tell me of the sea.", "pirate", stream=True, logprobs=True, top_logprobs=2)
    )
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == expected.text
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert len(entries) == expected.usage["completion_tokens"]
    assert all(len(entry.top_logprobs) >= 2 and entry.logprob <= 0 for entry in entries)


def test_too_much_for_the_context_is_told_with_the_numbers(site):
    with pytest.raises(APIError) as refusal:
        site.theirs("word " * 1200)
    assert refusal.value.code == "context_length_exceeded"


def test_a_stopped_answer_stops_there(site):
    with site.theirs("Count to a thousand.", tokens=900, stream=True) as stream:
        next(iter(stream))
    wait_for(
        lambda: sum(server.metric("num_requests_running") for server in site.servers) == 0,
        60,
        "the rows to be free",
    )


def test_an_evaluation_is_answered_by_both_servers_as_by_the_engine(site, adapter):
    before = [server.metric("generation_tokens_total") for server in site.servers]
    rows = [
        {"prompt": f"Say {number} in a word.", "response": f"It is {number}."}
        for number in range(8)
    ]
    status, dataset = upload(site.portal, site.key, rows, name="numbers", train_percent="0")
    assert status == 201, dataset
    wish = {
        "dataset": dataset["id"], "adapter": adapter[0], "split": "train", "decoding": "greedy",
        "checkpoint": site.portal.get("/api/v1/checkpoints/", key=site.key)[1]["results"][0]["id"],
        "max_source_length": 48, "max_target_length": 8,
    }  # fmt: skip
    status, run = site.portal.call("POST", "/api/v1/evaluation-runs/", wish, key=site.key)
    assert status == 201, run
    path = f"/api/v1/evaluation-runs/{run['id']}/"
    run = finished(site.portal, site.key, path, 600)
    assert run["status"] == "succeeded", run["error"]
    found = site.portal.get(f"{path}predictions/", key=site.key)[1]["results"]
    assert len(found) == 8
    for prediction in found[:3]:
        expected = site.ours(prediction["prompt"], adapter[1], tokens=8)
        assert prediction["prediction"] == expected.text
    after = [server.metric("generation_tokens_total") for server in site.servers]
    assert all(now > then for now, then in zip(after, before, strict=True))


def test_one_server_is_killed_in_mid_stream_and_the_other_goes_on(site):
    """Last: one server is gone afterwards."""
    stream = site.theirs("Tell a long story.", tokens=700, stream=True)
    chunks = iter(stream)
    wait_for(lambda: next(chunks).choices[0].delta.content, 60, "the first words")
    busy = next(server for server in site.servers if server.metric("num_requests_running"))
    busy.kill()
    with pytest.raises(APIError) as lost:
        list(chunks)
    assert "does not" in str(lost.value) or "upstream" in json.dumps(lost.value.body)
    for _ in range(3):
        assert site.theirs("Hello!", tokens=4).choices[0].message.content
    assert site.portal.healthy()["status"] == "ok"
