"""Changing what is served, on a portal as people run it: streams go on, a broken checkpoint is
taken back, an idle one leaves memory.
"""

import json
import subprocess
import sys
import threading
from urllib.request import Request, urlopen

import psutil
import pytest

from tests.support import ROOT, tiny_training
from tests.support.live_portal import Portal, free_port, wait_for

pytestmark = pytest.mark.slow
SECOND = "inference_worker --checkpoint second"


class Stream(threading.Thread):
    """A streamed answer of /v1/chat/completions, read to its end. lines: what came."""

    def __init__(self, portal, key, model, tokens):
        super().__init__(daemon=True)
        body = {"model": model, "stream": True, "max_tokens": tokens, "temperature": 0.7}
        body |= {"messages": [{"role": "user", "content": "你好"}], "seed": 1, "ignore_eos": True}
        body.pop("ignore_eos")
        self.request = Request(
            f"{portal.url}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )
        self.lines, self.begun = [], threading.Event()
        self.start()

    def run(self):
        with urlopen(self.request, timeout=120) as answer:
            for line in answer:
                self.lines.append(line.decode().strip())
                if '"content"' in self.lines[-1]:
                    self.begun.set()

    def chunks(self) -> list[dict]:
        return [json.loads(line[6:]) for line in self.lines if line.startswith("data: {")]

    def reasons(self) -> list:
        return [
            choice["finish_reason"]
            for chunk in self.chunks()
            for choice in chunk.get("choices", [])
            if choice["finish_reason"]
        ]


def ask(portal, key, model, tokens=8):
    body = {"model": model, "max_tokens": tokens, "temperature": 0}
    body["messages"] = [{"role": "user", "content": "你好"}]
    return portal.call("POST", "/v1/chat/completions", body, key=key)


def switched(portal, key, number):
    def ended():
        switch = portal.get(f"/api/v1/serving-switches/{number}/", key=key)[1]
        return switch if switch["status"] in ("succeeded", "failed") else None

    return wait_for(ended, 90, "the change to end")


def serve(portal, key, name):
    """What POST .../serve/ answers."""
    rows = portal.get("/api/v1/checkpoints/", key=key)[1]["results"]
    number = next(row["id"] for row in rows if row["name"] == name)
    return portal.call("POST", f"/api/v1/checkpoints/{number}/serve/", {}, key=key)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two that work, and one whose weights are NaN: it loads, and cannot say anything."""
    root = tmp_path_factory.mktemp("checkpoints")
    for number, name in enumerate(("first", "second")):
        tiny_training.write(root / name, seed=number, max_position_embeddings=4096)
    broken = tiny_training.model(seed=2)
    broken.model.norm.weight.data.fill_(float("nan"))
    broken.save_pretrained(root / "broken")
    tiny_training.tokenizer().save_pretrained(root / "broken")
    return root


def test_another_checkpoint_is_served_while_streams_run(tmp_path, folders):
    with Portal(tmp_path / "data", OMP_NUM_THREADS="1") as portal:
        wait_for(portal.healthy, 120, "the portal")
        key = portal.manage("create_api_key", "admin").strip().splitlines()[-1]
        for name in ("first", "second", "broken"):
            portal.manage("add_checkpoint", str(folders / name), "--name", name)
        status, switch = serve(portal, key, "first")
        assert status == 202 and switch["previous"] == "starter"
        assert switch["requested_by"] == "admin"
        waiting = ask(portal, key, "first")  # not there yet: it waits, it is not refused
        assert waiting[0] == 200, waiting
        done = switched(portal, key, switch["id"])
        assert done["status"] == "succeeded" and done["seconds"] > 0
        pid = portal.pid_of("inference_worker")

        running = [Stream(portal, key, "first", 3000) for _ in range(3)]
        assert all(stream.begun.wait(60) for stream in running)
        _status, switch = serve(portal, key, "second")
        held = Stream(portal, key, "second", 8)
        done = switched(portal, key, switch["id"])
        assert done["status"] == "succeeded", done
        still = [stream for stream in running if stream.is_alive()]
        for stream in [*running, held]:
            stream.join(120)
            assert stream.reasons() and set(stream.reasons()) <= {"stop", "length"}, stream.lines
        assert still, "the answers ended before the change: it was not tried beside them"
        assert any(line.startswith(": ") for line in held.lines), held.lines[:3]
        assert ask(portal, key, "second")[0] == 200
        refused = ask(portal, key, "first")
        assert (refused[0], refused[1]["error"]["code"]) == (503, "no_worker_for_checkpoint")

        _status, switch = serve(portal, key, "broken")
        hopeful = ask(portal, key, "broken")
        done = switched(portal, key, switch["id"])
        assert (done["status"], done["error"]["code"]) == ("failed", "try_out_failed"), done
        assert hopeful[0] == 503 and hopeful[1]["error"]["code"] == "loading_failed", hopeful
        assert ask(portal, key, "second")[0] == 200
        rows = portal.get("/api/v1/checkpoints/", key=key)[1]["results"]
        assert [row["name"] for row in rows if row["is_default"]] == ["second"]

        (folders / "first" / "model.safetensors").write_bytes(b"damaged")
        _status, switch = serve(portal, key, "first")
        done = switched(portal, key, switch["id"])
        assert (done["status"], done["error"]["code"]) == ("failed", "weights_invalid"), done
        assert ask(portal, key, "second")[0] == 200
        assert portal.pid_of("inference_worker") == pid  # nothing of this needed a new process
        assert serve(portal, key, "second")[0] == 409
        assert "wanted by admin" in portal.output()


def resident(portal) -> int:
    return psutil.Process(portal.pid_of("inference_worker")).memory_info().rss


def test_an_idle_model_leaves_memory_and_comes_back(tmp_path):
    """RSS: what the weights take, within a fifth."""
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 10}
    folder = tiny_training.write(tmp_path / "large", max_position_embeddings=512, **shape)
    weights = (folder / "model.safetensors").stat().st_size  # float32, as in memory
    with Portal(tmp_path / "data", OMP_NUM_THREADS="1", PORTAL_IDLE_UNLOAD="0.1") as portal:
        wait_for(portal.healthy, 120, "the portal")
        key = portal.manage("create_api_key", "admin").strip().splitlines()[-1]
        portal.manage("add_checkpoint", str(folder), "--name", "large", "--default")
        assert ask(portal, key, "large")[0] == 200  # chosen, so it waits
        loaded = resident(portal)

        def state(wanted):
            return wait_for(
                lambda: portal.get("/healthz")[1]["worker"]["state"] == wanted, 60, wanted
            )

        state("resting")
        assert portal.get("/healthz")[1]["status"] == "ok"
        wait_for(lambda: loaded - resident(portal) > 0.8 * weights, 20, "memory to be freed")
        told = Stream(portal, key, "large", 4)
        told.join(60)
        assert any(line.startswith(": loading large") for line in told.lines), told.lines
        assert set(told.reasons()) <= {"stop", "length"} and told.reasons()
        assert resident(portal) > loaded - 0.2 * weights


def test_each_of_several_workers_is_found_by_its_checkpoint(tmp_path, folders):
    port = free_port()
    other = f"http://127.0.0.1:{port}"
    socket = tmp_path / "data" / "worker.sock"
    portal = Portal(tmp_path / "data", OMP_NUM_THREADS="1", PORTAL_WORKERS=f"unix:{socket},{other}")
    with portal:
        wait_for(portal.healthy, 120, "the portal")
        key = portal.manage("create_api_key", "admin").strip().splitlines()[-1]
        portal.manage("add_checkpoint", str(folders / "second"), "--name", "second")
        assert ask(portal, key, "second")[1]["error"]["code"] == "no_worker_for_checkpoint"
        worker = subprocess.Popen(
            [sys.executable, "manage.py", *f"{SECOND} --listen {other}".split()],
            cwd=ROOT,
            env=portal.environment,
        )
        try:
            wait_for(lambda: ask(portal, key, "second")[0] == 200, 90, "the second worker")
            assert ask(portal, key, "starter")[0] == 200
            # chosen as the default, the other worker changes over; this one has it at once
            _status, switch = serve(portal, key, "second")
            assert ask(portal, key, "second")[0] == 200
            assert switched(portal, key, switch["id"])["status"] == "succeeded"
            worker.terminate()
            worker.wait(20)
            assert ask(portal, key, "second")[0] == 200
        finally:
            worker.kill()
