"""The trainer process: `python -m tuning.train RUN TOKEN`, started by the queue's task for a run
that it has claimed.

Asked to stop it saves a checkpoint, from which the run goes on later (portal/runs/heartbeat.py says
who asks how).
"""

from __future__ import annotations

import os
import sys
from functools import partial

import django

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")
    django.setup()

from django.conf import settings

from chat.checkpoints.describe import CheckpointInvalid
from chat.registry import publish_adapter
from portal.models import Run
from portal.runs import device_lock, heartbeat
from portal.runs.children import run_folder
from portal.runs.heartbeat import STEP_ASIDE, Asked, Heart, RunFailed, Say
from tuning.datasets.store import open_split
from tuning.models import TuningMetric, TuningRun


def carry_out(run_id: int, token: str, say: Say) -> str:
    """Trains a claimed run to its end and returns its status; the run's row says the rest."""
    run = TuningRun.objects.select_related("owner", "checkpoint", "dataset_version").get(pk=run_id)
    status = heartbeat.carry_out(run_id, token, lambda heart: _train(run, heart, say), say)
    if status == Run.Status.SUCCEEDED:
        from tuning.ptuning import training_state

        training_state.delete_all(run.checkpoint_folder)  # the adapter is all that is needed now
    return status


def _write(metric: TuningMetric) -> None:
    """A resumed run logs some steps again, with the same values."""
    TuningMetric.objects.bulk_create(
        [metric],
        update_conflicts=True,
        unique_fields=["run", "step"],
        update_fields=["loss", "learning_rate", "samples_per_second"],
    )
    TuningRun.objects.filter(pk=metric.run_id).update(
        loss=metric.loss, samples_per_second=metric.samples_per_second
    )


def _train(run: TuningRun, heart: Heart, say: Say) -> None:
    """Loads, trains and publishes. Returns when the adapter is there."""
    heart.tell(phase="loading")
    import torch
    from transformers.utils.logging import disable_progress_bar

    from chat.engine import adapters, loading
    from tuning.ptuning.recipe import Recipe
    from tuning.ptuning.trainer import Progress, Stopped, Trainer

    disable_progress_bar()  # the log is a file
    recipe = Recipe.from_dict(run.recipe)
    device = settings.DEVICE or str(loading.default_device())
    if device == "cpu":
        os.nice(5)  # chat comes first: its worker shares these processors
    say(
        f"run {run.pk}, attempt {run.attempt}: {run.checkpoint} on {device}, "
        f"{run.recipe['dataset']['rows']} examples, "
        f"{recipe.max_steps} steps of {recipe.samples_per_step}"
    )

    with device_lock.hold(device, heart.wait):
        heart.tell(phase="loading")
        dtype = None if recipe.precision == "auto" else getattr(torch, recipe.precision)
        try:
            loaded = loading.load(
                run.checkpoint.path,
                device=device,
                dtype=dtype,
                quantization_bit=recipe.quantization_bit,
            )
        except CheckpointInvalid as fault:
            raise RunFailed("checkpoint_invalid", str(fault)) from fault
        if loaded.fingerprint != run.recipe["checkpoint"]["fingerprint"]:
            raise RunFailed(
                "checkpoint_changed",
                "the checkpoint's files are not those that the run was planned with",
            )
        heart.check()
        with open_split(run.dataset_version, run.recipe["dataset"]["split"]) as examples:

            def report(progress: Progress) -> bool:
                heart.tell(progress=progress.step, phase="training")
                if progress.logged is not None:
                    say(_line(progress))
                    metric = TuningMetric(
                        run_id=run.pk,
                        step=progress.step,
                        loss=progress.logged,
                        learning_rate=progress.learning_rate,
                        samples_per_second=progress.samples_per_second,
                    )
                    heart.tell(partial(_write, metric))
                if progress.step % recipe.save_steps == 0:
                    heart.flush()  # before a checkpoint makes sure that it is never told again
                return heart.wish is not None

            trainer = Trainer(loaded, recipe, examples, run.checkpoint_folder, report)
            say(
                f"{trainer.trainable_parameters:,} parameters are trained; the base model is frozen"
            )
            if trainer.step:
                say(f"going on after step {trainer.step}")
            planned = TuningRun.objects.filter(pk=run.pk)
            heart.tell(
                lambda: planned.update(trainable_parameters=trainer.trainable_parameters),
                phase="training",
                progress=trainer.step,
                total=recipe.max_steps,
            )
            heart.patient = True
            try:
                prefix = trainer.train()
            except Stopped as stopped:
                say(f"stopped after step {stopped.step}, checkpoint saved")
                raise Asked(heart.wish or STEP_ASIDE) from None
        heart.tell(phase="saving")
        prefix.metadata |= {"run": run.pk, "name": run.name, "checkpoint": run.checkpoint.name}
        folder = run_folder(run.pk) / "adapter"
        adapters.save(prefix, folder)
        adapter = publish_adapter(
            folder,
            name=run.name,
            checkpoint=run.checkpoint,
            owner=run.owner,
            run=run,
            step=recipe.max_steps,
        )
        say(f"adapter “{adapter.name}”: {adapter.sha256}")


def _line(progress) -> str:
    """One logged step, for the run's log."""
    speed = progress.samples_per_second
    return (
        f"step {progress.step}/{progress.max_steps}  loss {progress.logged:.4f}  lr "
        f"{progress.learning_rate:.3e}  "
        f"{speed:.1f} examples/s"
    )


if __name__ == "__main__":
    carry_out(int(sys.argv[1]), sys.argv[2], heartbeat.log_line)
