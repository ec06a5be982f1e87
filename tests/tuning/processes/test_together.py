"""Two processes on the CPU (gloo), started by accelerate as a run starts them, against one."""

import os
import signal
from dataclasses import replace

import psutil
import pytest
import torch

from chat.engine import adapters
from chat.engine.loading import load
from portal.runs.heartbeat import ProcessLost
from tests.support import tiny_training as tiny
from tests.tuning.weights.test_trainer import FULL
from tuning.datasets.store import open_split
from tuning.methods import METHODS
from tuning.processes import launch
from tuning.processes.launch import accelerate_config, train_apart
from tuning.ptuning.progress import Stopped, TrainingFailed
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.team import Team

FULL = replace(FULL, max_steps=12, save_steps=4, eval_steps=4)
PREFIX = replace(FULL, method="ptuning_v2", pre_seq_len=4, learning_rate=5e-2)
RECIPES = {
    "ptuning_v2": PREFIX,
    "full": FULL,
    "lora": replace(FULL, method="lora", learning_rate=1e-2),
}


def test_a_steps_rows_are_shared_out_evenly():
    lengths = [5, 30, 7, 7, 12, 90, 1]
    shares = [Team(rank, 3).share(lengths) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == list(range(7))
    assert {len(share) for share in shares} == {2, 3}
    assert Team().share(lengths) == list(range(7))
    assert [Team(rank, 2).share([4]) for rank in range(2)] == [[0], []]


def test_accelerate_is_told_to_start_torchrun_on_processors_too():
    config = accelerate_config("cpu", 2)
    assert (config["use_cpu"], config["num_processes"]) == (True, 2)
    assert accelerate_config("cuda", 4)["use_cpu"] is False


class Job:
    """A job over the rows of a dataset, as tuning/work.py gives it."""

    def __init__(self, dataset, folder, recipe: Recipe):
        splits = dataset.current.splits
        self.base, self.folder, self.recipe = folder / "base", folder, recipe
        if not self.base.exists():
            tiny.write(self.base, tie_word_embeddings=True)
        self.version = dataset.current
        self.job = {
            "processes": 2,
            "device": "cpu",
            "checkpoint": str(self.base),
            "fingerprint": load(self.base, device="cpu").fingerprint,
            "recipe": replace(recipe, devices=2).as_dict(),
            "rows": splits["train"]["sha256"],
            "validation": splits["train"]["sha256"],
            "prompts": [{"prompt": "q1"}, {"prompt": "q2"}],
            "initial": None,
            "state": str(folder / "state"),
            "steps": str(folder / "steps"),
            "general": str(folder / "general"),
            "result": str(folder / "result"),
            "told": {"run": 1},
        }
        self.steps, self.began = {}, []

    def run(self, until: int | None = None, each=lambda progress: None):
        def report(progress):
            self.steps[progress.step] = progress
            each(progress)
            return progress.step == until

        return train_apart(
            self.job, self.folder / "processes", lambda **told: self.began.append(told), report
        )

    def alone(self):
        """What one process learns: (its progress by step, the folder of the result)."""
        steps, method = {}, METHODS[self.recipe.method]
        with open_split(self.version, "train") as rows:
            trainer = method.trainer(
                load(self.base, device="cpu", dtype=torch.float32),
                self.recipe,
                rows,
                None,
                lambda progress: steps.update({progress.step: progress}),
                validation=rows,
            )
            method.write(trainer, trainer.train(), self.folder / "alone", {"run": 1}, [])
        return steps, self.folder / "alone"


@pytest.mark.slow
@pytest.mark.parametrize("method", list(RECIPES))
def test_two_processes_do_the_updates_of_one(
    method, make_dataset, admin_user, tmp_path, monkeypatch
):
    """Stopped on the way and gone on, too: the second launch begins with the saved state."""
    monkeypatch.setattr(launch, "POLL", 0.005)  # so that it is stopped before it ends
    job = Job(make_dataset(admin_user, 9), tmp_path, RECIPES[method])
    with pytest.raises(Stopped) as stopped:
        job.run(until=2)
    assert 2 <= stopped.value.step < 12 and not (tmp_path / "result").exists()
    done = job.run()
    assert [told["step"] for told in job.began] == [0, stopped.value.step]
    expected, folder = job.alone()
    assert done["step"] == 12 and list(job.steps) == list(expected)
    for step, progress in expected.items():
        assert job.steps[step].loss == pytest.approx(progress.loss, rel=1e-3)
        assert job.steps[step].gradient_norm == pytest.approx(progress.gradient_norm, rel=1e-3)
        if progress.validation is not None:
            assert job.steps[step].validation == pytest.approx(progress.validation, rel=1e-3)
    if method == "ptuning_v2":
        mine, theirs = adapters.load(tmp_path / "result"), adapters.load(folder)
        torch.testing.assert_close(mine.tensor, theirs.tensor, rtol=1e-3, atol=1e-4)
        assert done["proof"]["holds"] and (tmp_path / "steps" / "step-12").is_dir()
        return
    mine, theirs = (
        load(one, device="cpu", dtype=torch.float32).model.state_dict()
        for one in (tmp_path / "result", folder)
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.slow
def test_a_killed_process_ends_all_of_them_and_the_run_is_to_go_on(
    make_dataset, admin_user, tmp_path
):
    job = Job(make_dataset(admin_user, 9), tmp_path, replace(PREFIX, max_steps=5000))
    ranks = []

    def kill_the_second(progress):
        if progress.step == 6:  # one state has been saved
            children = psutil.Process().children(recursive=True)
            ranks.extend(one for one in children if "tuning.processes.rank" in one.cmdline()[3:])
            assert len(ranks) >= 2
            os.kill(ranks[-1].pid, signal.SIGKILL)

    with pytest.raises(ProcessLost):
        job.run(each=kill_the_second)
    assert not psutil.wait_procs(ranks, timeout=20)[1]
    assert (tmp_path / "state").is_dir()


@pytest.mark.slow
def test_a_fault_in_the_processes_is_the_runs(make_dataset, admin_user, tmp_path):
    job = Job(make_dataset(admin_user, 9), tmp_path, PREFIX)
    job.job["fingerprint"] = "0" * 64
    with pytest.raises(TrainingFailed) as failed:
        job.run()
    assert failed.value.code == "checkpoint_changed"
