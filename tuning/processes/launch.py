"""The side of the run's own process: it starts the others through `accelerate launch`, hears what
they tell, asks them to stop, and ends them when it ends, however that is. No torch.

They talk through files in one folder: `job.json` says what is to be done, `events.jsonl` what has
been, a line each, and `stop` is there once they shall save their state and end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from django.conf import settings

from portal.runs.children import spawn, stop
from portal.runs.heartbeat import ProcessLost
from tuning.ptuning.progress import Progress, Report, Stopped, TrainingFailed

JOB, EVENTS, STOP, CONFIG = "job.json", "events.jsonl", "stop", "accelerate.json"
POLL = 0.2  # seconds


def accelerate_config(device: str, processes: int) -> dict[str, Any]:
    """What `accelerate launch` reads. Its launcher for processors alone wants MPI, so they too are
    started as its GPU processes are, by torchrun; each then takes the device of the job. Weights
    are shared out by the processes themselves (tuning/weights/sharding.py).
    """
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "use_cpu": device == "cpu",
        "num_machines": 1,
        "num_processes": processes,
        "machine_rank": 0,
        "main_process_port": 0,  # a free one
        "mixed_precision": "no",
    }


def train_apart(
    job: dict[str, Any], folder: Path, begins: Callable[..., None], report: Report
) -> dict[str, Any]:
    """Carries `job` (see rank.py) out in `job["processes"]` processes and returns {"step", "proof"}
    when what was learnt lies in `job["result"]`.

    begins: called with step, learning and dropped when training begins; report as of Trainer.
    Raises TrainingFailed, Stopped (the state is saved), and ProcessLost when a process has died.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / JOB).write_text(json.dumps(job, ensure_ascii=False), encoding="utf-8")
    config = accelerate_config(job["device"], job["processes"])
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    threads = max(1, (os.cpu_count() or 1) // job["processes"])
    launcher = spawn(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file"),
            *(str(folder / CONFIG), "-m", "tuning.processes.rank", str(folder)),
        ],
        cwd=settings.BASE_DIR,
        env={
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "PORTAL_DATA_DIR": str(settings.DATA_DIR),
        },
    )
    try:
        for event, told in _events(folder / EVENTS, lambda: launcher.poll() is not None):
            if event == "begins":
                begins(**told)
            elif event == "step" and report(Progress(**told)):
                (folder / STOP).touch()
            elif event == "failed":
                raise TrainingFailed(told["code"], told["message"])
            elif event == "stopped":
                raise Stopped(told["step"])
            elif event == "done":
                return told
    finally:
        if launcher.poll() is None:
            stop(launcher, grace=5.0)
    raise ProcessLost(f"one of {job['processes']} training processes died")


def _events(path: Path, ended: Callable[[], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(event, what it tells) of each line as it is written, until all processes have ended."""
    position, last = 0, False
    while True:
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
            file.seek(position)
            while (line := file.readline()).endswith("\n"):
                position = file.tell()
                yield from json.loads(line).items()
        if last:
            return
        last = ended()  # what was written before it is read once more
        if not last:
            time.sleep(POLL)
