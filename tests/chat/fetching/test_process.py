"""Downloads through a real queue, with their process killed, and through the command."""

import json
import os
import signal
import sqlite3
import subprocess
from contextlib import closing

import pytest

from tests.support.file_server import COMMIT, Fault
from tests.support.folders import checkpoint_folder
from tests.support.live_portal import Portal, wait_for

WEIGHTS = f"/org/name/resolve/{COMMIT}/model.safetensors"


def environment(server) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.url, "HF_TOKEN": "hf_secret"}


@pytest.fixture
def hub(server, tmp_path):
    folder = checkpoint_folder(tmp_path / "original")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.add_repository("org/name", files)
    return server


@pytest.mark.slow
def test_a_download_outlives_its_process(hub, tmp_path):
    hub.fault(WEIGHTS, Fault(hold=3000))
    with Portal(tmp_path / "data", "--no-worker", **environment(hub)) as portal:
        portal.password()
        key = portal.manage("create_api_key", "admin").strip()
        body = {"source": "hf:org/name"}
        status, run = portal.call("POST", "/api/v1/fetch-runs/", body, key=key)
        assert status == 201
        assert hub.holding.wait(60)

        def told():
            return portal.get(f"/api/v1/fetch-runs/{run['id']}/", key=key)[1]

        kept = portal.data_dir / "checkpoints" / ".incoming"
        wait_for(lambda: [p for p in kept.rglob("*.part") if p.stat().st_size], 30, "bytes")
        os.kill(process_of(portal, run["id"]), signal.SIGKILL)
        hub.released.set()
        done = wait_for(lambda: (now := told())["status"] == "succeeded" and now, 90, "the end")
        assert done["attempt"] == 2 and done["checkpoint"]
        assert hub.asked(WEIGHTS)[-1]["Range"].startswith("bytes=")
        assert all(one["Authorization"] == "Bearer hf_secret" for one in hub.asked(WEIGHTS))
        log = portal.get(f"/api/v1/fetch-runs/{run['id']}/log/", key=key)[1]
        assert "hf_secret" not in str(log) + json.dumps(done) + portal.output()


def process_of(portal: Portal, run_id: int) -> int:
    """The pid of the run's process: the one that has its token among its arguments."""
    with closing(sqlite3.connect(portal.data_dir / "portal.sqlite3", timeout=20)) as database:
        (token,) = database.execute("select token from portal_run where id=?", [run_id]).fetchone()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if token.encode() in file.read():
                    return int(pid)
        except OSError:
            continue
    raise AssertionError("the run has no process")


@pytest.mark.slow
def test_the_command_fetches_and_goes_on(hub, tmp_path):
    hub.fault(WEIGHTS, Fault(cut=3000), Fault(status=404))
    portal = Portal(tmp_path / "data", **environment(hub))
    portal.data_dir.mkdir()
    portal.manage("migrate", "-v", "0")
    portal.manage(
        "shell",
        "-v",
        "0",
        "-c",
        "from portal.models import User;User.objects.create_superuser('admin')",
    )
    with pytest.raises(subprocess.CalledProcessError) as caught:
        portal.manage("fetch_checkpoint", "hf:org/name")
    assert "model.safetensors" in caught.value.stderr
    said = portal.manage("fetch_checkpoint", "hf:org/name", "--name", "mine", "--default")
    assert said.startswith("mine: Qwen2ForCausalLM")
    assert hub.asked(WEIGHTS)[-1]["Range"] == "bytes=3000-"
