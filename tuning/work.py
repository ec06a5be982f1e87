"""A tuning run, carried out: load, train, publish.

Asked to stop it saves its state, from which the run goes on later (portal/runs/heartbeat.py says
who asks how).
"""

from __future__ import annotations

import contextlib
import shutil
from functools import partial
from pathlib import Path

from django.conf import settings

from chat.model_work import ModelWork
from chat.registry import publish_adapter
from portal.models import Run
from portal.runs.heartbeat import STEP_ASIDE, Heartbeat, RunFailed, StopRequested
from tuning import made_checkpoints
from tuning.datasets.examples import messages_of
from tuning.datasets.store import VALIDATION, examples, open_split
from tuning.methods import METHODS
from tuning.models import TuningMetric, TuningRun
from tuning.ptuning.progress import Progress, Report, Stopped
from tuning.ptuning.recipe import FULL, Recipe
from tuning.saved_steps import keeper


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
        """Returns when what was learnt is published."""
        heartbeat.tell(phase=Run.Phase.LOADING)
        run, recipe = self.run, Recipe.from_dict(self.run.recipe)
        self.method = METHODS[recipe.method]
        plan = (
            f"{recipe.method}, {run.recipe['dataset']['rows']} examples, "
            f"{recipe.max_steps} steps of {recipe.samples_per_step}"
        )
        folder = run.folder / self.method.makes
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
        learn = self._apart if recipe.devices > 1 else self._here
        step, proof = learn(recipe, heartbeat, plan, folder)
        self._accept(proof, heartbeat)
        self._publish(folder, step)

    def _here(
        self, recipe: Recipe, heartbeat: Heartbeat, plan: str, folder: Path
    ) -> tuple[int, dict | None]:
        """(the step whose result lies in `folder` now, the proof of it)"""
        import torch

        precision = self.method.precision(recipe)
        with self.loaded_model(
            heartbeat,
            plan,
            quantization_bit=recipe.quantization_bit,
            dtype=getattr(torch, precision) if precision else None,
        ) as loaded:
            trainer, learnt = self._trained(loaded, recipe, heartbeat)
            heartbeat.tell(phase=Run.Phase.SAVING)
            prompts = [
                loaded.prompter.prompt_ids(
                    messages_of(row["prompt"], row.get("history") or ()), recipe.max_source_length
                )
                for row in self._rows_for_proof()
            ]
            proof = self.method.write(trainer, learnt, folder, self._told(), prompts)
        return trainer.best_step, proof.as_dict() if proof else None

    def _apart(
        self, recipe: Recipe, heartbeat: Heartbeat, plan: str, folder: Path
    ) -> tuple[int, dict | None]:
        """The same by processes that share the examples."""
        import torch

        from tuning.processes.launch import train_apart

        run, splits = self.run, self.run.dataset_version.splits
        with self.held_devices(heartbeat, plan, recipe.devices) as device:
            if device != "cpu" and torch.cuda.device_count() < recipe.devices:
                message = (
                    f"{torch.cuda.device_count()} devices here, the run wants {recipe.devices}"
                )
                raise RunFailed("too_few_devices", message)
            job = {
                "processes": recipe.devices,
                "device": device,
                "checkpoint": run.checkpoint.path,
                "fingerprint": run.recipe["checkpoint"]["fingerprint"],
                "recipe": recipe.as_dict(),
                "rows": run.recipe["dataset"]["sha256"],
                "validation": recipe.eval_steps and splits.get(VALIDATION, {}).get("sha256"),
                "prompts": self._rows_for_proof(),
                "initial": recipe.init == "adapter" and str(self._adapter_before(recipe)),
                "state": str(run.state_folder),
                "steps": str(run.steps_folder),
                "general": str(settings.DATA_DIR / "general"),
                "result": str(folder),
                "told": self._told(),
            }
            begins = partial(self._begins, recipe, heartbeat)
            try:
                done = train_apart(
                    job, run.folder / "processes", begins, self._report(recipe, heartbeat)
                )
            except Stopped as stopped:
                raise self._stopped(stopped, heartbeat) from None
        return done["step"], done["proof"]

    def _told(self) -> dict:
        """What the files of what is learnt say of where they come from."""
        run = self.run
        if self.method.makes == "checkpoint":
            return made_checkpoints.told_of(run)
        with open_split(run.dataset_version, run.recipe["dataset"]["split"]) as rows:
            # how it wants to be asked travels with its files
            told = {"with_history": rows.has_history()}
        return told | {"run": run.pk, "name": run.name, "checkpoint": run.checkpoint.name}

    def _publish(self, folder: Path, step: int) -> None:
        run = self.run
        TuningRun.objects.filter(pk=run.pk).update(result_step=step)
        if self.method.makes == "checkpoint":
            checkpoint = made_checkpoints.publish(run, folder)
            self.log(f"checkpoint “{checkpoint.name}”: {checkpoint.path}")
            return
        adapter = publish_adapter(
            folder, name=run.name, checkpoint=run.checkpoint, owner=run.owner, run=run, step=step
        )
        self.log(f"adapter “{adapter.name}”: {adapter.sha256}")

    def _rows_for_proof(self) -> list[dict]:
        from tuning.ptuning.proof import PROMPTS

        version = self.run.dataset_version
        rows = examples(version, version.split_for_evaluation(), 0, PROMPTS)
        return [row for row in rows if row["prompt"].strip()]

    def _accept(self, proof: dict | None, heartbeat: Heartbeat) -> None:
        """What will be served answers as what was trained; RunFailed when it does not. Nothing is
        published then.
        """
        if proof is None:
            return
        run = self.run
        heartbeat.tell(lambda: TuningRun.objects.filter(pk=run.pk).update(proof=proof))
        self.log(
            f"served and trained model: {proof['same']} of {proof['prompts']} prompts answered "
            f"with the same {proof['tokens']} tokens, largest gap {proof['gap']:.2g} of "
            f"{proof['tolerance']:g}"
        )
        if not proof["holds"]:
            raise RunFailed(
                "not_proven",
                f"what would be served answers otherwise than what was trained: its token is "
                f"{proof['gap']:.3g} logits behind, {proof['tolerance']:g} would be rounding",
            )

    def _adapter_before(self, recipe: Recipe) -> Path:
        return settings.DATA_DIR / "adapters" / recipe.init_adapter

    def _before(self, recipe: Recipe):
        """The prefix that the run goes on from; None where it begins otherwise."""
        if recipe.init != "adapter":
            return None
        from chat.engine import adapters

        try:
            return adapters.load(self._adapter_before(recipe)).tensor
        except adapters.AdapterInvalid as fault:
            raise RunFailed("file_missing", str(fault)) from fault

    def _stopped(self, stopped: Stopped, heartbeat: Heartbeat) -> StopRequested:
        self.log(f"stopped after step {stopped.step}, state saved")
        return StopRequested(heartbeat.stop_requested or STEP_ASIDE)

    def _report(self, recipe, heartbeat: Heartbeat) -> Report:
        """What a trainer tells each step to; its answer: whether to stop."""
        run = self.run

        def report(progress: Progress) -> bool:
            heartbeat.tell(progress=progress.step, phase=Run.Phase.TRAINING)
            if progress.logged is not None or progress.validation is not None:
                self.log(_line(progress))
                heartbeat.tell(partial(_write, _metric(run, progress)))
            if progress.step % recipe.save_steps == 0:
                heartbeat.flush()  # a saved state makes sure that it is never told again
            return heartbeat.stop_requested is not None

        return report

    def _begins(self, recipe, heartbeat: Heartbeat, step: int, learning: int, dropped: int) -> None:
        """The first words about the training: `learning` parameters are trained."""
        whole = recipe.method == FULL
        self.log(
            f"{learning:,} parameters are trained" + ("" if whole else "; the base model is frozen")
        )
        if dropped:
            self.log(f"{dropped:,} examples longer than the lengths are left out")
        if step:
            self.log(f"going on after step {step}")
        planned = TuningRun.objects.filter(pk=self.run.pk)
        heartbeat.tell(
            lambda: planned.update(trainable_parameters=learning),
            phase=Run.Phase.TRAINING,
            progress=step,
            total=recipe.max_steps,
        )
        heartbeat.work_asks = True

    def _trained(self, loaded, recipe, heartbeat: Heartbeat):
        """(the trainer, what it has learnt after the last step); goes on from the newest saved
        state.
        """
        run = self.run
        version = run.dataset_version
        with contextlib.ExitStack() as opened:
            rows = opened.enter_context(open_split(version, run.recipe["dataset"]["split"]))
            held_out = ()
            if recipe.eval_steps and VALIDATION in version.splits:
                held_out = opened.enter_context(open_split(version, VALIDATION))
            trainer = self.method.trainer(
                loaded,
                recipe,
                rows,
                run.state_folder,
                self._report(recipe, heartbeat),
                initial=self._before(recipe),
                validation=held_out,
                keep=keeper(run.steps_folder, self._told()),
                general_folder=settings.DATA_DIR / "general",
            )
            self._begins(
                recipe, heartbeat, trainer.step, trainer.trainable_parameters, trainer.dropped
            )
            try:
                return trainer, trainer.train()
            except Stopped as stopped:
                raise self._stopped(stopped, heartbeat) from None

    def after_success(self) -> None:
        from tuning.ptuning import training_state

        training_state.delete_all(self.run.state_folder)  # the adapter is all that is needed now


def _metric(run: TuningRun, progress) -> TuningMetric:
    return TuningMetric(
        run_id=run.pk,
        step=progress.step,
        # a step that was only validated tells its own loss
        loss=progress.loss if progress.logged is None else progress.logged,
        learning_rate=progress.learning_rate,
        samples_per_second=progress.samples_per_second,
        divergence=progress.divergence,
        validation_loss=progress.validation,
    )


def _write(metric: TuningMetric) -> None:
    """A resumed run logs some steps again, with the same values."""
    TuningMetric.objects.bulk_create(
        [metric],
        update_conflicts=True,
        unique_fields=["run", "step"],
        update_fields=[
            "loss",
            "learning_rate",
            "samples_per_second",
            "divergence",
            "validation_loss",
        ],
    )
    told = {"loss": metric.loss, "samples_per_second": metric.samples_per_second}
    if metric.validation_loss is not None:
        told["validation_loss"] = metric.validation_loss
    TuningRun.objects.filter(pk=metric.run_id).update(**told)


def _line(progress) -> str:
    """One logged step, for the run's log."""
    speed = progress.samples_per_second
    return (
        f"step {progress.step}/{progress.max_steps}  loss "
        f"{progress.loss if progress.logged is None else progress.logged:.4f}  lr "
        f"{progress.learning_rate:.3e}  "
        + (f"validation {progress.validation:.4f}  " if progress.validation is not None else "")
        + (f"kl {progress.divergence:.4f}  " if progress.divergence is not None else "")
        + f"{speed:.1f} examples/s"
    )
