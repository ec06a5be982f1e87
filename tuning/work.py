"""A tuning run, carried out: load, train, publish.

Asked to stop it saves its state, from which the run goes on later (portal/runs/heartbeat.py says
who asks how).
"""

from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from django.conf import settings

from chat.checkpoints import memory
from chat.model_work import ModelWork
from chat.registry import publish_adapter
from portal.models import Run
from portal.runs.figures import Figure
from portal.runs.heartbeat import STEP_ASIDE, Heartbeat, RunFailed, StopRequested
from tuning.datasets.examples import messages_of
from tuning.datasets.store import VALIDATION, examples, open_split
from tuning.figures import figures_of
from tuning.methods import METHODS
from tuning.models import TuningMetric, TuningRun
from tuning.ptuning.recipe import Recipe
from tuning.sweep_work import carry_out_sweep

KEPT_STEPS = 20  # saved steps of a run that can be published


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

    def _estimate(self, recipe: Recipe, device: str, examples: int) -> int | None:
        description = self.run.checkpoint.description
        precision = "bfloat16" if recipe.precision == "float16" else recipe.precision
        if precision == "auto" or recipe.quantization_bit:
            precision = memory.held_as(description, device, recipe.quantization_bit)
        tokens = examples * (recipe.max_source_length + recipe.max_target_length)
        estimate = memory.ptuning(description, precision, recipe.pre_seq_len, tokens)
        return None if estimate is None else estimate.bytes

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
        """Returns when the adapter is published."""
        heartbeat.tell(phase=Run.Phase.LOADING)
        import torch

        run, recipe = self.run, Recipe.from_dict(self.run.recipe)
        plan = (
            f"{run.recipe['dataset']['rows']} examples, "
            f"{recipe.max_steps} steps of {recipe.samples_per_step}"
        )
        dtype = None if recipe.precision == "auto" else getattr(torch, recipe.precision)
        with self.loaded_model(
            heartbeat, plan, quantization_bit=recipe.quantization_bit, dtype=dtype
        ) as loaded:
            with open_split(run.dataset_version, run.recipe["dataset"]["split"]) as rows:
                # how it wants to be asked travels with its files
                self._told = {"with_history": rows.has_history()}
            self._told |= {"run": run.pk, "name": run.name, "checkpoint": run.checkpoint.name}
            if run.recipe.get("sweep"):
                carry_out_sweep(self, loaded, heartbeat)
                return
            prefix = self._trained(loaded, recipe, heartbeat)
            adapter = self.publish(loaded, recipe, prefix, heartbeat, run.folder / "adapter")
            self.log(f"adapter “{adapter.name}”: {adapter.sha256}")

    def publish(self, loaded, recipe, prefix, heartbeat: Heartbeat, folder, name: str = ""):
        """The adapter of a prefix that has been proven to be served as it was trained; RunFailed
        when it is not. name: the run's, unless given; else the adapter is not the run's own.
        """
        from chat.engine import adapters
        from chat.engine.request import AdapterRef

        run, step = self.run, prefix.metadata["step"]
        heartbeat.tell(phase=Run.Phase.SAVING)
        prefix.metadata |= self._told
        served = AdapterRef(adapters.save(prefix, folder), str(folder))
        self._prove(loaded, recipe, prefix, served, heartbeat)
        if not name:
            TuningRun.objects.filter(pk=run.pk).update(result_step=step)
        return publish_adapter(
            folder,
            name=name or run.name,
            checkpoint=run.checkpoint,
            owner=run.owner,
            run=run,
            step=step,
        )

    def _prove(self, loaded, recipe, prefix, served, heartbeat: Heartbeat) -> None:
        """What will be served answers as what was trained; RunFailed when it does not. Nothing is
        published then.
        """
        from tuning.ptuning.proof import PROMPTS, prove

        run = self.run
        rows = examples(run.dataset_version, run.dataset_version.split_for_evaluation(), 0, PROMPTS)
        prompts = [
            loaded.prompter.prompt_ids(
                messages_of(row["prompt"], row.get("history") or ()), recipe.max_source_length
            )
            for row in rows
            if row["prompt"].strip()
        ]
        if not prompts:
            return
        proof = prove(loaded, prefix.tensor, served, prompts)
        heartbeat.tell(lambda: TuningRun.objects.filter(pk=run.pk).update(proof=proof.as_dict()))
        self.log(
            f"served and trained prefix: {proof.same} of {proof.prompts} prompts answered with the "
            f"same {proof.tokens} tokens, largest gap {proof.gap:.2g} of {proof.tolerance:g}"
        )
        if not proof.holds:
            raise RunFailed(
                "not_proven",
                f"the served prefix answers otherwise than the trained one: its token is "
                f"{proof.gap:.3g} logits behind, {proof.tolerance:g} would be rounding",
            )

    def _before(self, recipe):
        """The prefix that the run goes on from; None where it begins otherwise."""
        return self._stored(recipe.init_adapter) if recipe.init == "adapter" else None

    def _stored(self, sha256: str):
        from chat.engine import adapters

        try:
            return adapters.load(settings.DATA_DIR / "adapters" / sha256).tensor
        except adapters.AdapterInvalid as fault:
            raise RunFailed("file_missing", str(fault)) from fault

    def _keep(self, step: int, prefix) -> None:
        """One saved step as an adapter that may be published; the oldest give way."""
        from chat.engine import adapters

        folder = self.run.steps_folder
        prefix.metadata |= {**self._told, "step": step}
        adapters.save(prefix, folder / f"step-{step}")
        for older in self.run.saved_steps()[KEPT_STEPS:]:
            shutil.rmtree(folder / f"step-{older}", ignore_errors=True)

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
            method = METHODS[run.recipe["method"]]

            def make(recipe, *arguments, **options):
                return method.trainer(
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
            heartbeat.tell(partial(_write, metric, peak_memory()))
        if progress.step % save_steps == 0:
            heartbeat.flush()  # a saved state makes sure that it is never told again
        return heartbeat.stop_requested is not None

    def begin(self, trainer, dropped: int, heartbeat: Heartbeat) -> None:
        """What is known before the first step."""
        self.log(
            f"{trainer.trainable_parameters:,} parameters are trained; the base model is frozen"
        )
        if dropped:
            self.log(f"{dropped:,} examples longer than the lengths are left out")
        if trainer.step:
            self.log(f"going on after step {trainer.step}")
        planned = TuningRun.objects.filter(pk=self.run.pk)
        heartbeat.tell(
            lambda: planned.update(trainable_parameters=trainer.trainable_parameters),
            phase=Run.Phase.TRAINING,
            progress=trainer.step,
            total=self.run.recipe["max_steps"],
        )
        heartbeat.work_asks = True

    @contextlib.contextmanager
    def stopping(self, heartbeat: Heartbeat) -> Iterator[None]:
        """A trainer that stopped between two steps ends the run's process."""
        from tuning.ptuning.progress import Stopped

        try:
            yield
        except Stopped as stopped:
            self.log(f"stopped after step {stopped.step}, state saved")
            raise StopRequested(heartbeat.stop_requested or STEP_ASIDE) from None

    def _trained(self, loaded, recipe, heartbeat: Heartbeat):
        """The prefix after the last step; goes on from the newest saved state."""
        report = partial(self.report, heartbeat, recipe.save_steps)
        with self.trainers(loaded) as make:
            trainer = make(recipe, self.run.state_folder, report, keep=self._keep)
            self.begin(trainer, trainer.dropped, heartbeat)
            with self.stopping(heartbeat):
                return trainer.train()

    def after_success(self) -> None:
        from tuning.ptuning import training_state

        training_state.delete_all(self.run.state_folder)  # the adapter is all that is needed now

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


def _write(metric: TuningMetric, memory: int) -> None:
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
    told = {
        "loss": metric.loss,
        "samples_per_second": metric.samples_per_second,
        "peak_memory": memory,
    }
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
