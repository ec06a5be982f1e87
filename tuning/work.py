"""A tuning run, carried out: load, train, publish.

Asked to stop it saves its state, from which the run goes on later (portal/runs/heartbeat.py says
who asks how).
"""

from __future__ import annotations

from functools import partial

from django.conf import settings

from chat.model_work import ModelWork
from chat.registry import publish_adapter
from portal.models import Run
from portal.runs.heartbeat import STEP_ASIDE, Heartbeat, StopRequested
from tuning.datasets.store import open_split
from tuning.methods import METHODS
from tuning.models import TuningMetric, TuningRun
from tuning.ptuning.recipe import Recipe


class TuningWork(ModelWork):
    kind = Run.Kind.TUNING
    model = TuningRun

    @classmethod
    def size(cls, recipe: dict) -> int:
        """Examples that the run reads."""
        plan = Recipe.from_dict(recipe)
        return plan.max_steps * plan.samples_per_step

    def load(self, run_id: int) -> TuningRun:
        return TuningRun.objects.select_related("owner", "checkpoint", "dataset_version").get(
            pk=run_id
        )

    def work(self, heartbeat: Heartbeat) -> None:
        """Returns when the adapter is published."""
        heartbeat.tell(phase=Run.Phase.LOADING)
        import torch

        from chat.engine import adapters

        run, recipe = self.run, Recipe.from_dict(self.run.recipe)
        plan = (
            f"{run.recipe['dataset']['rows']} examples, "
            f"{recipe.max_steps} steps of {recipe.samples_per_step}"
        )
        dtype = None if recipe.precision == "auto" else getattr(torch, recipe.precision)
        with self.loaded_model(
            heartbeat, plan, quantization_bit=recipe.quantization_bit, dtype=dtype
        ) as loaded:
            prefix = self._trained(loaded, recipe, heartbeat)
            heartbeat.tell(phase=Run.Phase.SAVING)
            prefix.metadata |= {"run": run.pk, "name": run.name, "checkpoint": run.checkpoint.name}
            with open_split(run.dataset_version, run.recipe["dataset"]["split"]) as examples:
                # how it wants to be asked travels with its files
                prefix.metadata["with_history"] = examples.has_history()
            folder = run.folder / "adapter"
            adapters.save(prefix, folder)
            adapter = publish_adapter(
                folder,
                name=run.name,
                checkpoint=run.checkpoint,
                owner=run.owner,
                run=run,
                step=recipe.max_steps,
            )
            self.log(f"adapter “{adapter.name}”: {adapter.sha256}")

    def _trained(self, loaded, recipe, heartbeat: Heartbeat):
        """The prefix after the last step; goes on from the newest saved state."""
        from tuning.ptuning.trainer import Progress, Stopped

        run = self.run

        def report(progress: Progress) -> bool:
            heartbeat.tell(progress=progress.step, phase=Run.Phase.TRAINING)
            if progress.logged is not None:
                self.log(_line(progress))
                heartbeat.tell(partial(_write, _metric(run, progress)))
            if progress.step % recipe.save_steps == 0:
                heartbeat.flush()  # a saved state makes sure that it is never told again
            return heartbeat.stop_requested is not None

        with open_split(run.dataset_version, run.recipe["dataset"]["split"]) as examples:
            method = METHODS[run.recipe["method"]]
            trainer = method.trainer(
                loaded,
                recipe,
                examples,
                run.state_folder,
                report,
                general_folder=settings.DATA_DIR / "general",
            )
            self.log(
                f"{trainer.trainable_parameters:,} parameters are trained; the base model is frozen"
            )
            if trainer.step:
                self.log(f"going on after step {trainer.step}")
            planned = TuningRun.objects.filter(pk=run.pk)
            heartbeat.tell(
                lambda: planned.update(trainable_parameters=trainer.trainable_parameters),
                phase=Run.Phase.TRAINING,
                progress=trainer.step,
                total=recipe.max_steps,
            )
            heartbeat.work_asks = True
            try:
                return trainer.train()
            except Stopped as stopped:
                self.log(f"stopped after step {stopped.step}, state saved")
                raise StopRequested(heartbeat.stop_requested or STEP_ASIDE) from None

    def after_success(self) -> None:
        from tuning.ptuning import training_state

        training_state.delete_all(self.run.state_folder)  # the adapter is all that is needed now


def _metric(run: TuningRun, progress) -> TuningMetric:
    return TuningMetric(
        run_id=run.pk,
        step=progress.step,
        loss=progress.logged,
        learning_rate=progress.learning_rate,
        samples_per_second=progress.samples_per_second,
        divergence=progress.divergence,
    )


def _write(metric: TuningMetric) -> None:
    """A resumed run logs some steps again, with the same values."""
    TuningMetric.objects.bulk_create(
        [metric],
        update_conflicts=True,
        unique_fields=["run", "step"],
        update_fields=["loss", "learning_rate", "samples_per_second", "divergence"],
    )
    TuningRun.objects.filter(pk=metric.run_id).update(
        loss=metric.loss, samples_per_second=metric.samples_per_second
    )


def _line(progress) -> str:
    """One logged step, for the run's log."""
    speed = progress.samples_per_second
    return (
        f"step {progress.step}/{progress.max_steps}  loss {progress.logged:.4f}  lr "
        f"{progress.learning_rate:.3e}  "
        + (f"kl {progress.divergence:.4f}  " if progress.divergence is not None else "")
        + f"{speed:.1f} examples/s"
    )
