"""`python -m tuning.processes.rank FOLDER`, started by accelerate: one of the processes that train
together. It knows its job's files and no database.

job.json: {"processes", "device", "checkpoint" (folder), "fingerprint", "recipe", "rows" and
"validation" (sha256 of splits; validation may be null), "prompts" (rows that the result is proven
on), "initial" (an adapter's folder or null), "micro_batch_tokens" (or null), "state", "steps",
"general" and "result" (folders), "told" (what the result says of where it is from)}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import django

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")
    django.setup()

from portal.runs.children import end_with_parent
from tuning.datasets.examples import messages_of
from tuning.datasets.files import Split
from tuning.methods import METHODS
from tuning.processes.launch import EVENTS, JOB, STOP
from tuning.ptuning.progress import Progress, Stopped, TrainingFailed
from tuning.ptuning.recipe import Recipe
from tuning.saved_steps import keeper


def work(folder: Path) -> None:
    import torch
    from accelerate import PartialState

    from chat.engine import adapters
    from chat.engine.loading import load
    from tuning.ptuning.team import Team

    job: dict[str, Any] = json.loads((folder / JOB).read_text(encoding="utf-8"))
    recipe = Recipe.from_dict(job["recipe"])
    state = PartialState(cpu=job["device"] == "cpu")
    device = torch.device("cpu") if job["device"] == "cpu" else state.device  # never "cpu:0"
    team = Team(state.process_index, state.num_processes, device)

    def tell(event: str, **told: Any) -> None:
        if not team.rank:
            _write(folder, event, told)

    def report(progress: Progress) -> bool:
        tell("step", **asdict(progress))
        return not team.rank and (folder / STOP).exists()

    method = METHODS[recipe.method]
    precision = method.precision(recipe)
    loaded = load(
        job["checkpoint"],
        device=device,
        dtype=getattr(torch, precision) if precision else None,
        quantization_bit=recipe.quantization_bit,
    )
    if loaded.fingerprint != job["fingerprint"]:
        message = "the checkpoint's files are not those that the run was planned with"
        raise TrainingFailed("checkpoint_changed", message)
    trainer = method.trainer(
        loaded,
        recipe,
        Split(job["rows"]),
        job["state"],
        report,
        initial=adapters.load(job["initial"]).tensor if job["initial"] else None,
        validation=Split(job["validation"]) if job["validation"] else (),
        micro_batch_tokens=job.get("micro_batch_tokens"),
        keep=None if team.rank else keeper(Path(job["steps"]), job["told"]),
        general_folder=Path(job["general"]),
        team=team,
    )
    learning, dropped = trainer.trainable_parameters, trainer.dropped
    tell("begins", step=trainer.step, learning=learning, dropped=dropped)
    try:
        learnt = trainer.train()
    except Stopped as stopped:
        tell("stopped", step=stopped.step)
        return
    prompts = [
        loaded.prompter.prompt_ids(
            messages_of(row["prompt"], row.get("history") or ()), recipe.max_source_length
        )
        for row in job["prompts"]
    ]
    proof = method.write(trainer, learnt, Path(job["result"]), job["told"], prompts)
    tell("done", step=trainer.best_step, proof=proof and proof.as_dict())


def _code(fault: Exception) -> str | None:
    """Of a fault that would come again in any attempt, in whichever process it came up."""
    if isinstance(fault, TrainingFailed):
        return fault.code
    by_name = {
        "CheckpointInvalid": "checkpoint_invalid",
        "AdapterInvalid": "file_missing",
        "FileNotFoundError": "file_missing",
        "OutOfMemoryError": "out_of_memory",
    }
    return by_name.get(type(fault).__name__)


def _write(folder: Path, event: str, told: dict[str, Any]) -> None:
    with open(folder / EVENTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({event: told}) + "\n")


if __name__ == "__main__":
    # accelerate's process may be killed so that it can end nobody
    parent = os.getppid()
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    try:
        work(Path(sys.argv[1]))
    except Exception as fault:
        code = _code(fault)
        if code is None:  # perhaps because another process died: then the run is to go on
            raise
        _write(Path(sys.argv[1]), "failed", {"code": code, "message": str(fault)})
        sys.exit(1)
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
