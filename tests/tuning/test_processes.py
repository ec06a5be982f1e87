"""Tuning runs through a real queue, with its processes killed. The portal runs as a subprocess,
without an inference worker.
"""

import json
import os
import re
import signal
import sqlite3
import time
from contextlib import closing

import pytest

from tests.support import tiny_training as tiny
from tests.support.live_portal import Portal, wait_for

pytestmark = pytest.mark.slow

RING = """
from tuning.models import TuningRun
from portal.runs import lifecycle
for _ in range(4):
    lifecycle.ring(TuningRun.objects.order_by("-id").first().pk)
"""
ROWS = "\n".join(
    json.dumps({"content": row["prompt"], "summary": row["response"]}) for row in tiny.examples(40)
)


class Runs:
    """The portal's tuning runs, over REST."""

    def __init__(self, portal: Portal, folder):
        self.portal = portal
        self.key = portal.manage("create_api_key", "admin").strip()
        portal.manage("add_checkpoint", str(tiny.write(folder / "tiny")), "--name", "tiny")
        (folder / "rows.json").write_text(ROWS, encoding="utf-8")
        portal.manage(
            "shell",
            "-v",
            "0",
            "-c",
            "from tuning.datasets.store import ingest; from portal.models import User;"
            f"ingest(open({str(folder / 'rows.json')!r}, 'rb'), name='rows', "
            "owner=User.objects.get(),"
            "prompt_column='content', response_column='summary')",
        )
        self.dataset = self.get("datasets")["results"][0]["id"]
        self.checkpoint = next(
            row["id"] for row in self.get("checkpoints")["results"] if row["name"] == "tiny"
        )

    def get(self, path: str):
        return self.portal.get(f"/api/v1/{path}/", key=self.key)[1]

    def start(self, steps: int, **changes) -> int:
        body = {
            "dataset": self.dataset,
            "checkpoint": self.checkpoint,
            "name": "run",
            "pre_seq_len": 4,
            "max_steps": steps,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_source_length": 40,
            "max_target_length": 24,
            "logging_steps": 5,
            "save_steps": 20,
            "learning_rate": 0.05,
            **changes,
        }
        status, run = self.portal.call("POST", "/api/v1/tuning-runs/", body, key=self.key)
        assert status == 201, run
        return run["id"]

    def state(self, run: int) -> dict:
        return self.get(f"tuning-runs/{run}")

    def post(self, run: int, verb: str):
        return self.portal.call("POST", f"/api/v1/tuning-runs/{run}/{verb}/", key=self.key)

    def after_step(self, run: int, step: int) -> dict:
        def reached():
            state = self.state(run)
            return state["step"] > step and state

        return wait_for(reached, 120, f"step {step} of run {run}: {self.log(run)}")

    def end(self, run: int, status: str = "succeeded") -> dict:
        def ended():
            state = self.state(run)
            return state["status"] not in ("queued", "running") and state

        state = wait_for(ended, 150, f"the end of run {run}: {self.log(run)}")
        assert state["status"] == status, self.log(run)
        return state

    def log(self, run: int) -> str:
        return self.portal.get(f"/api/v1/tuning-runs/{run}/log/", key=self.key)[1]

    def trainer(self) -> int:
        return wait_for(lambda: self._pid("portal.runs.process"), 30, "a trainer")

    def _pid(self, word: str):
        return min(
            (pid for pid, command in self.portal.processes().items() if word in command),
            default=None,
        )

    def finished_once(self, run: int, steps: int) -> None:
        """One adapter, every logged step once, and the same prefix as without any fault."""
        adapters = [
            adapter for adapter in self.get("adapters")["results"] if adapter["tuning_run"] == run
        ]
        assert len(adapters) == 1 and adapters[0]["step"] == steps
        points = self.get(f"tuning-runs/{run}/metrics")["results"]
        assert [point["step"] for point in points] == list(range(5, steps + 1, 5))
        assert self.log(run).count("adapter “") == 1


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    with Portal(folder / "data", "--no-worker", PORTAL_DEVICE="cpu") as portal:
        wait_for(lambda: portal.healthy(worker=False), 90, "the portal")
        yield Runs(portal, folder)


def parent_of(pid: int) -> int:
    return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])


def resumed_after(log: str) -> list[int]:
    return [int(step) for step in re.findall(r"going on after step (\d+)", log)]


STEPS = 400


@pytest.fixture(scope="module")
def undisturbed(running):
    run = running.start(STEPS)
    running.end(run)
    running.finished_once(run, STEPS)
    return [
        (point["step"], point["loss"])
        for point in running.get(f"tuning-runs/{run}/metrics")["results"]
    ]


def losses(running, run):
    return [
        (point["step"], point["loss"])
        for point in running.get(f"tuning-runs/{run}/metrics")["results"]
    ]


def test_a_killed_trainer_goes_on_from_its_checkpoint(running, undisturbed):
    run = running.start(STEPS)
    running.after_step(run, 60)
    os.kill(running.trainer(), signal.SIGKILL)
    state = running.end(run)
    assert state["attempt"] == 2
    (step,) = resumed_after(running.log(run))
    assert step >= 60 and step % 20 == 0
    running.finished_once(run, STEPS)
    assert losses(running, run) == undisturbed, "bit for bit what an undisturbed run computes"


def test_a_killed_queue_worker_costs_no_attempt(running, undisturbed):
    """The kernel tells the trainer (SIGTERM): it saves, puts the run back, and the supervisor rings
    again.
    """
    run = running.start(STEPS)
    running.after_step(run, 30)
    os.kill(parent_of(running.trainer()), signal.SIGKILL)
    state = running.end(run)
    assert state["attempt"] == 1 and resumed_after(running.log(run))
    running.finished_once(run, STEPS)
    assert losses(running, run) == undisturbed


def test_a_hung_trainer_is_killed_and_its_run_goes_on(running, undisturbed):
    run = running.start(STEPS)
    running.after_step(run, 30)
    os.kill(running.trainer(), signal.SIGSTOP)
    state = running.end(run)
    assert state["attempt"] == 2
    running.finished_once(run, STEPS)


def test_a_stopped_trainer_without_a_queue_worker_gives_the_device_back(running, undisturbed):
    """It cannot hear SIGTERM; the supervisor, which has adopted it, kills it after a grace."""
    run = running.start(STEPS)
    running.after_step(run, 30)
    trainer = running.trainer()
    worker = parent_of(trainer)
    os.kill(trainer, signal.SIGSTOP)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: trainer not in running.portal.processes(), 60, "the trainer's end")
    running.end(run)
    running.finished_once(run, STEPS)
    assert losses(running, run) == undisturbed


def test_a_killed_supervisor_leaves_no_trainer_and_the_next_goes_on(running, undisturbed):
    run = running.start(STEPS)
    running.after_step(run, 30)
    running.portal.stop(signal.SIGKILL)
    wait_for(lambda: not running.portal.processes(), 25, "all processes to end")
    running.portal.start()
    wait_for(lambda: running.portal.healthy(worker=False), 90, "the portal")
    state = running.end(run)
    assert state["attempt"] == 1, "the trainer saved and stepped aside"
    running.finished_once(run, STEPS)
    assert losses(running, run) == undisturbed


def test_cancel_saves_and_resume_goes_on(running, undisturbed):
    run = running.start(STEPS)
    running.after_step(run, 10)
    began = time.monotonic()
    assert running.post(run, "cancel")[0] == 200
    state = running.end(run, "cancelled")
    assert time.monotonic() - began < 30 and 10 < state["step"] < STEPS and state["adapter"] is None
    wait_for(lambda: running._pid("portal.runs.process") is None, 10, "the trainer's end")
    assert running.post(run, "resume")[0] == 200
    running.end(run)
    assert resumed_after(running.log(run)) == [state["step"]]
    running.finished_once(run, STEPS)
    assert losses(running, run) == undisturbed


def test_a_run_rung_five_times_trains_once(running):
    run = running.start(40)
    running.portal.manage("shell", "-v", "0", "-c", RING)
    assert running.end(run)["attempt"] == 1

    def deliveries():
        with closing(sqlite3.connect(running.portal.data_dir / "portal.sqlite3")) as database:
            found = database.execute(
                "SELECT name FROM django_q_task WHERE name = ?", (f"run-{run}",)
            )
            return len(found.fetchall()) >= 2

    wait_for(deliveries, 60, "another delivery, which did nothing")
    running.finished_once(run, 40)
    assert running.log(run).count("attempt 1") == 1


def test_a_fault_of_the_run_s_own_is_told_and_not_repeated(running):
    run = running.start(50, learning_rate=1.0, precision="float16", max_grad_norm=0.0)
    folder = running.portal.data_dir / "datasets"
    hidden = [path.rename(path.with_suffix(".away")) for path in folder.glob("*.jsonl")]
    try:
        state = running.end(run, "failed")
    finally:
        for path in hidden:
            path.rename(path.with_suffix(".jsonl"))
    assert state["attempt"] == 1 and state["error"]["code"] == "file_missing"
    assert "failed: " in running.log(run)
