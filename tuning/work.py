"""A tuning run, carried out: load, train, publish.

Asked to stop it saves its state, from which the run goes on later (portal/runs/heartbeat.py says
who asks how).
"""

from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from django.conf import settings

from chat.checkpoints import memory
from chat.model_work import ModelWork
from chat.models import Adapter, Checkpoint
from chat.registry import publish_adapter
from portal.devices import inventory
from portal.devices.placing import Wish
from portal.models import Run
from portal.runs.figures import Figure
from portal.runs.heartbeat import STEP_ASIDE, Heartbeat, RunFailed, StopRequested
from tuning import made_checkpoints
from tuning.datasets.examples import messages_of
from tuning.datasets.store import VALIDATION, examples, open_split
from tuning.figures import figures_of
from tuning.methods import METHODS
from tuning.models import TuningMetric, TuningRun
from tuning.ptuning.progress import Stopped
from tuning.ptuning.recipe import FULL, METHOD, Recipe
from tuning.saved_steps import keeper
from tuning.sweep_work import carry_out_sweep


class TuningWork(ModelWork):
    kind = Run.Kind.TUNING
    model = TuningRun

    @classmethod
    def size(cls, recipe: dict) -> int:
        """Examples that the run reads."""
        plan = Recipe.from_dict(recipe)
        return plan.max_steps * plan.samples_per_step

    def bytes_needed(self, device: str) -> tuple[int, int] | None:
        """With batches of the recipe's size; with one example at a time."""
        recipe = Recipe.from_dict(self.run.recipe)
        most = self._estimate(recipe, device, recipe.per_device_train_batch_size)
        least = self._estimate(recipe, device, 1)
        return None if most is None or least is None else (most, least)

    def wish(self) -> Wish:
        """Where several devices are wanted, the first ones together, as accelerate counts them;
        processors are one device whatever the number of processes. RunFailed where there are fewer.
        """
        wish, count = super().wish(), Recipe.from_dict(self.run.recipe).devices
        here = {device.name for device in inventory.register()}
        if count == 1 or not any(name.startswith("cuda") for name in here):
            return wish
        names = tuple(f"cuda:{number}" for number in range(count))
        if not here.issuperset(names):
            message = f"{', '.join(sorted(here))} are here, the run wants {', '.join(names)}"
            raise RunFailed("too_few_devices", message)
        return replace(wish, names=names, together=True)

    def _estimate(self, recipe: Recipe, device: str, examples: int) -> int | None:
        """Bytes, of all processes together."""
        description = self.run.checkpoint.description
        precision = "bfloat16" if recipe.precision == "float16" else recipe.precision
        if precision == "auto" or recipe.quantization_bit:
            precision = memory.held_as(description, device, recipe.quantization_bit)
        tokens = examples * (recipe.max_source_length + recipe.max_target_length)
        if recipe.method == FULL:  # its processes share one model out
            estimate = memory.full(description, precision)
            return None if estimate is None else estimate.bytes
        estimate = memory.ptuning(description, precision, recipe.prefix_length, tokens)
        if estimate is None:
            return None
        needed = estimate.bytes
        if recipe.method != METHOD:  # for the proof what was made is loaded beside the base
            needed += sum(t.bytes for t in estimate.terms if t.name in ("weights", "measured"))
        return needed * recipe.devices

    def _micro_batch_tokens(self, recipe: Recipe, device: str) -> int | None:
        """Where less was granted than the recipe's batches take: how much of them is computed at
        once. Their gradients add up to the same update.
        """
        needed, granted = self.bytes_needed(device), self.granted
        if needed is None or granted is None or granted.bytes >= needed[0]:
            return None
        one = self._estimate(recipe, device, 2)
        each = (one or 0) - needed[1]  # bytes of one more example
        examples = 1 + (granted.bytes - needed[1]) // each if each > 0 else 1
        self.log(
            f"{granted.bytes / 1e9:.2f} of {needed[0] / 1e9:.2f} GB beside chat: {examples} of "
            f"{recipe.per_device_train_batch_size} examples at once, the same update"
        )
        return examples * (recipe.max_source_length + recipe.max_target_length)

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
        if run.recipe.get("sweep"):
            with self._loaded(recipe, heartbeat, plan) as loaded:
                carry_out_sweep(self, loaded, heartbeat)
            return
        folder = run.folder / self.method.makes
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
        learn = self._apart if recipe.devices > 1 else self._here
        step, proof = learn(recipe, heartbeat, plan, folder)
        self._accept(proof, heartbeat)
        made = self._publish(folder, step)
        what = made.sha256 if isinstance(made, Adapter) else made.path
        self.log(f"{self.method.makes} “{made.name}”: {what}")

    def _loaded(self, recipe: Recipe, heartbeat: Heartbeat, plan: str):
        import torch

        precision = self.method.precision(recipe)
        return self.loaded_model(
            heartbeat,
            plan,
            quantization_bit=recipe.quantization_bit,
            dtype=getattr(torch, precision) if precision else None,
        )

    def _here(
        self, recipe: Recipe, heartbeat: Heartbeat, plan: str, folder: Path
    ) -> tuple[int, dict | None]:
        """(the step whose result lies in `folder` now, the proof of it)"""
        with self._loaded(recipe, heartbeat, plan) as loaded:
            trainer, learnt = self._trained(loaded, recipe, heartbeat)
            return trainer.best_step, self._write(trainer, learnt, folder, heartbeat)

    def _apart(
        self, recipe: Recipe, heartbeat: Heartbeat, plan: str, folder: Path
    ) -> tuple[int, dict | None]:
        """The same by processes that share the examples."""
        from tuning.processes.launch import train_apart

        run, splits = self.run, self.run.dataset_version.splits
        with self.held_devices(heartbeat, plan) as device:
            kind = device.partition(":")[0]
            job = {
                "processes": recipe.devices,
                "device": kind,
                "checkpoint": run.checkpoint.path,
                "fingerprint": run.recipe["checkpoint"]["fingerprint"],
                "recipe": recipe.as_dict(),
                "rows": run.recipe["dataset"]["sha256"],
                "validation": recipe.eval_steps and splits.get(VALIDATION, {}).get("sha256"),
                "prompts": self._rows_for_proof(),
                "initial": recipe.init == "adapter" and str(self._folder_of(recipe.init_adapter)),
                "micro_batch_tokens": self._micro_batch_tokens(recipe, kind),
                "state": str(run.state_folder),
                "steps": str(run.steps_folder),
                "general": str(settings.DATA_DIR / "general"),
                "result": str(folder),
                "told": self._told(),
            }
            begin = partial(self.begin, heartbeat)
            report = partial(self.report, heartbeat, recipe.save_steps)
            with self.stopping(heartbeat):
                done = train_apart(job, run.folder / "processes", begin, report)
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

    def publish(self, trainer, learnt, heartbeat: Heartbeat, folder: Path, name: str) -> Adapter:
        """The adapter of one of several prefixes; RunFailed when it is not served as it was
        trained. name: the run's if empty, else the adapter is not the run's own.
        """
        self._accept(self._write(trainer, learnt, folder, heartbeat), heartbeat)
        made = self._publish(folder, trainer.best_step, name)
        assert isinstance(made, Adapter)
        return made

    def _write(self, trainer, learnt, folder: Path, heartbeat: Heartbeat) -> dict | None:
        """What was learnt, as files in `folder`; returns the proof of them."""
        heartbeat.tell(phase=Run.Phase.SAVING)
        longest = self.run.recipe["max_source_length"]
        prompts = [
            trainer.loaded.prompter.prompt_ids(
                messages_of(row["prompt"], row.get("history") or ()), longest
            )
            for row in self._rows_for_proof()
        ]
        proof = self.method.write(trainer, learnt, folder, self._told(), prompts)
        return proof.as_dict() if proof else None

    def _publish(self, folder: Path, step: int, name: str = "") -> Adapter | Checkpoint:
        run = self.run
        if not name:
            TuningRun.objects.filter(pk=run.pk).update(result_step=step)
        if self.method.makes == "checkpoint":
            return made_checkpoints.publish(run, folder)
        return publish_adapter(
            folder,
            name=name or run.name,
            checkpoint=run.checkpoint,
            owner=run.owner,
            run=run,
            step=step,
        )

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

    def _before(self, recipe):
        """The prefix that the run goes on from; None where it begins otherwise."""
        return self._stored(recipe.init_adapter) if recipe.init == "adapter" else None

    def _stored(self, sha256: str):
        from chat.engine import adapters

        try:
            return adapters.load(self._folder_of(sha256)).tensor
        except adapters.AdapterInvalid as fault:
            raise RunFailed("file_missing", str(fault)) from fault

    def _folder_of(self, sha256: str) -> Path:
        return settings.DATA_DIR / "adapters" / sha256

    @contextlib.contextmanager
    def trainers(self, loaded) -> Iterator[Callable[..., Any]]:
        """make(recipe, ...) -> the trainer of the run's method, over the run's rows, which are open
        until the block ends.
        """
        run, version = self.run, self.run.dataset_version
        with contextlib.ExitStack() as opened:
            rows = opened.enter_context(open_split(version, run.recipe["dataset"]["split"]))
            held_out = ()
            if run.recipe.get("eval_steps") and VALIDATION in version.splits:
                held_out = opened.enter_context(open_split(version, VALIDATION))

            def make(recipe, *arguments, **options):
                return self.method.trainer(
                    loaded,
                    recipe,
                    rows,
                    *arguments,
                    initial=self._before(recipe),
                    beside=[self._stored(part) for part in recipe.beside.split(",") if part],
                    validation=held_out,
                    general_folder=settings.DATA_DIR / "general",
                    micro_batch_tokens=self._micro_batch_tokens(recipe, loaded.device.type),
                    **options,
                )

            yield make

    def report(self, heartbeat: Heartbeat, save_steps: int, progress, variant: int = 0) -> bool:
        """Writes down what a trainer tells of a step; whether it is to stop."""
        heartbeat.tell(progress=progress.step, phase=Run.Phase.TRAINING)
        if progress.logged is not None or progress.validation is not None:
            prefix = f"variant {variant + 1}  " if self.run.recipe.get("sweep") else ""
            self.log(prefix + _line(progress))
            metric = _metric(self.run, progress, variant)
            # of other processes it is not known here
            held = peak_memory() if self.run.recipe.get("devices", 1) == 1 else None
            heartbeat.tell(partial(_write, metric, held))
        if progress.step % save_steps == 0:
            heartbeat.flush()  # a saved state makes sure that it is never told again
        return heartbeat.stop_requested is not None

    def begin(self, heartbeat: Heartbeat, *, step: int, learning: int, dropped: int) -> None:
        """What is known before the first step: `learning` parameters are trained."""
        whole = self.run.recipe["method"] == FULL
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
            total=self.run.recipe["max_steps"],
        )
        heartbeat.work_asks = True

    @contextlib.contextmanager
    def stopping(self, heartbeat: Heartbeat) -> Iterator[None]:
        """A trainer that stopped between two steps ends the run's process."""
        try:
            yield
        except Stopped as stopped:
            self.log(f"stopped after step {stopped.step}, state saved")
            raise StopRequested(heartbeat.stop_requested or STEP_ASIDE) from None

    def _trained(self, loaded, recipe, heartbeat: Heartbeat):
        """(the trainer, what it has learnt after the last step); goes on from the newest saved
        state.
        """
        run, report = self.run, partial(self.report, heartbeat, recipe.save_steps)
        with self.trainers(loaded) as make:
            keep = keeper(run.steps_folder, self._told())
            trainer = make(recipe, run.state_folder, report, keep=keep)
            self.begin(
                heartbeat,
                step=trainer.step,
                learning=trainer.trainable_parameters,
                dropped=trainer.dropped,
            )
            with self.stopping(heartbeat):
                return trainer, trainer.train()

    def after_success(self) -> None:
        from tuning.ptuning import training_state

        training_state.delete_all(self.run.state_folder)  # what was made is all that is needed

    def figures(self) -> list[Figure]:
        return figures_of(TuningRun.objects.get(pk=self.run.pk))


def peak_memory() -> int:
    """Bytes that this process has held at most: on the GPU where it computes there, else in all."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _metric(run: TuningRun, progress, variant: int) -> TuningMetric:
    return TuningMetric(
        run_id=run.pk,
        step=progress.step,
        variant=variant,
        # a step that was only validated tells its own loss
        loss=progress.loss if progress.logged is None else progress.logged,
        learning_rate=progress.learning_rate,
        samples_per_second=progress.samples_per_second,
        divergence=progress.divergence,
        validation_loss=progress.validation,
    )


def _write(metric: TuningMetric, peak: int | None) -> None:
    """A resumed run logs some steps again, with the same values."""
    TuningMetric.objects.bulk_create(
        [metric],
        update_conflicts=True,
        unique_fields=["run", "step", "variant"],
        update_fields=[
            "loss",
            "learning_rate",
            "samples_per_second",
            "divergence",
            "validation_loss",
        ],
    )
    if metric.variant:  # the run itself tells of its first until it knows the best
        return
    told = {"loss": metric.loss, "samples_per_second": metric.samples_per_second}
    if peak is not None:
        told["peak_memory"] = peak
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
