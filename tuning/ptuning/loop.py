"""The training loop, whatever learns: a prefix (trainer.py) or weights (tuning/weights/).

Our own loop rather than transformers' Trainer: logits only where there are labels, micro-batches
grouped by length, a stop between any two steps, and a resume that is bit for bit what an
uninterrupted run would have computed.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from chat.engine.loading import Loaded
from tuning.ptuning import training_state
from tuning.ptuning.batches import MicroBatch, group_by_length, rows_of_step, token_weights
from tuning.ptuning.encoded import Encoded, TooLong
from tuning.ptuning.general_prompts import GENERAL_PROMPTS
from tuning.ptuning.loss import decoder_layers
from tuning.ptuning.memory import MicroBatchSize
from tuning.ptuning.progress import Progress, Report, Stopped, TrainingFailed
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.teacher import Lesson, lessons, spread
from tuning.ptuning.team import ALONE, Team
from tuning.ptuning.validation import BestStep, held_out

Row = tuple[list[int], list[int]]  # token ids and labels


class TrainingLoop(ABC):
    """One run: `train()` returns what was learnt, or raises TrainingFailed or Stopped.

    examples: random access to rows {"prompt", "response", "history"}. state_folder: where the
    run resumes from and saves every `save_steps` steps; None: nowhere. micro_batch_tokens: padded
    tokens of one forward; None: from free memory. Changes speed and memory, not the mathematics.
    validation: rows like the examples that are not learnt from; measured every `eval_steps` steps.
    general_prompts: what the base is asked when the recipe has a kl_weight; general_folder: where
    its answers are kept.
    team: the processes that share a step's rows, all of which do the same.
    """

    def __init__(
        self,
        loaded: Loaded,
        recipe: Recipe,
        examples: Sequence[dict[str, Any]],
        state_folder: str | Path | None = None,
        report: Report | None = None,
        *,
        validation: Sequence[dict[str, Any]] = (),
        micro_batch_tokens: int | None = None,
        general_prompts: Sequence[str] = GENERAL_PROMPTS,
        general_folder: Path | None = None,
        team: Team = ALONE,
    ):
        self.loaded, self.recipe, self.team = loaded, recipe, team
        self._folder, self._report = state_folder, report or (lambda progress: None)
        try:
            self._examples = Encoded(
                examples,
                loaded.prompter,
                recipe.max_source_length,
                recipe.max_target_length,
                recipe.overlong,
            )
        except TooLong as fault:
            raise TrainingFailed(fault.code, str(fault)) from fault
        self.dropped = self._examples.dropped  # rows left out because they are too long
        if not len(self._examples) and self.dropped:
            raise TrainingFailed("rows_too_long", "every example is longer than the lengths")
        if not len(self._examples):
            raise TrainingFailed("no_examples", "no example has both a prompt and a response")
        if any(parameter.requires_grad for parameter in loaded.model.parameters()):
            raise ValueError("the base model must be frozen: what learns is chosen here")
        longest = recipe.max_source_length + recipe.max_target_length
        longest += self._positions() if loaded.shifts_positions else 0
        if longest > loaded.context_length:
            message = (
                f"prefix, source and target need {longest} positions, "
                f"the checkpoint has {loaded.context_length}"
            )
            raise TrainingFailed("does_not_fit", message)
        # asked of the base before anything is made of it
        self._lessons = self._study(general_prompts, general_folder)
        torch.manual_seed(recipe.seed)
        self.layers = decoder_layers(loaded.model, loaded.layers)
        probe = torch.tensor([self._examples[0][0]], device=loaded.device)
        self.loss = self._prepare(examples, probe)
        self._optimizer = torch.optim.AdamW(
            self._parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        # What learns is float32; in float16 what flows back to it would underflow without a scale.
        self._scaler = torch.amp.GradScaler(
            loaded.device.type, enabled=self._computes_in() == torch.float16
        )
        self._scaler.scale(torch.ones((), device=loaded.device))  # what makes it ready
        self.pad_id = loaded.tokenizer.pad_token_id or 0
        self._most_tokens = micro_batch_tokens
        self.size = MicroBatchSize(
            loaded,
            recipe.max_source_length + recipe.max_target_length,
            recipe.prefix_length,
            micro_batch_tokens,
        )
        self.size.tokens = min(team.gathered(self.size.tokens))
        self.size.replay = team.any(self.size.replay)
        self.step = 0
        self._best = BestStep(recipe.early_stopping)
        self.last_loss: float | None = None  # logged
        self.validation_loss: float | None = None  # the last one measured
        self._validation = None
        if recipe.eval_steps:
            self._validation = held_out(
                self.loss,
                loaded,
                recipe,
                validation,
                tokens=self.size.tokens,
                overhead=self.size.overhead,
            )
        self._losses: list[float] = []  # since the last logged step
        self._began: float | None = None  # of what speed is told of; None before the first step
        self._samples = 0
        saved = training_state.load_newest(state_folder, loaded.device) if state_folder else None
        if saved is not None:
            self.load_state(saved)

    def _study(self, general_prompts: Sequence[str], folder: Path | None) -> list[Lesson]:
        """What the base itself answers to the general prompts that the run will read."""
        recipe = self.recipe
        if not recipe.kl_weight:
            return []
        found = lessons(
            self.loaded,
            spread(general_prompts, recipe.max_steps * recipe.general_prompts_per_step),
            max_source_length=recipe.max_source_length,
            max_target_length=recipe.max_target_length,
            folder=folder,
        )
        if not found:
            message = "the base answers none of the general prompts that kl_weight needs"
            raise TrainingFailed("no_general_answers", message)
        return found

    # -- what learns

    @abstractmethod
    def _prepare(
        self, examples: Sequence[dict[str, Any]], probe: torch.Tensor
    ) -> Callable[..., torch.Tensor]:
        """Makes what learns, as it is before the first step, and returns its loss. probe
        [1, length]: token ids of one example.
        """

    @abstractmethod
    def _parameters(self) -> list[torch.nn.Parameter]: ...

    @abstractmethod
    def _learnt(self) -> dict[str, torch.Tensor]:
        """What has been learnt so far, for a saved state and for the best step."""

    @abstractmethod
    def _set_learnt(self, learnt: dict[str, torch.Tensor]) -> None: ...

    @abstractmethod
    def _accumulate(self, rows: list[Row], general: list[Lesson]) -> tuple[float, float]:
        """Gradients of a whole step into .grad of what learns; returns (loss on the task, KL)."""

    @abstractmethod
    def _to_validate(self) -> torch.Tensor | None:
        """What the loss is asked for besides the rows."""

    @abstractmethod
    def _keep_step(self) -> None:
        """Keeps what a saved step has learnt, where that can be published."""

    @abstractmethod
    def _made(self) -> Any:
        """What `result` returns."""

    def _positions(self) -> int:
        """That stand before every prompt."""
        return self.recipe.prefix_length

    def _clipped(self, limit: float) -> float:
        """The gradients' norm, before they are scaled down to `limit`."""
        return torch.nn.utils.clip_grad_norm_(self._parameters(), limit).item()

    def _computes_in(self) -> torch.dtype:
        return self.loaded.dtype

    def _optimizer_state(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)

    # -- the loop

    @property
    def best_step(self) -> int:
        """The step whose result `train` returns."""
        return self._best.step if self._best.patience and self._best.step else self.step

    @property
    def result_loss(self) -> float | None:
        """The validation loss of what `train` returns."""
        return self._best.loss if self._best.patience else self.validation_loss

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._parameters())

    @property
    def ended(self) -> bool:
        return self.step >= self.recipe.max_steps or self._best.ends

    def train(self) -> Any:
        """Runs from `step`, where the newest saved state left off, to max_steps; or, with
        early_stopping, until the validation loss gets no better, and returns the best step's.
        """
        while not self.ended:
            progress = self.advance(*self._gradients(*self.due()))
            stop, done = self.team.any(bool(self._report(progress))), self.ended
            if self._folder is not None and (
                stop or done or self.step % self.recipe.save_steps == 0
            ):
                with self.pause():
                    state = self.state()
                    if not self.team.rank:
                        training_state.save(self._folder, self.step, state)
                    self._keep_step()
            if stop and not done:
                raise Stopped(self.step)
        return self.result()

    def result(self) -> Any:
        """Of an ended training: what the last step has learnt, or with early_stopping the best."""
        if self._best.patience and self._best.learnt is not None:
            self._set_learnt(self._best.learnt)
        return self._made()

    def advance(self, loss: float, divergence: float) -> Progress:
        """The optimizer's step, with the gradients that what learns holds, and what is to be
        told of it. loss and divergence: on the rows of `due`.
        """
        recipe = self.recipe
        learning_rate = recipe.learning_rate_at(self.step)
        norm = self._update(loss, learning_rate)
        self.step += 1
        self._losses.append(loss)
        self._samples += recipe.samples_per_step
        logged = None
        if self.step % recipe.logging_steps == 0 or self.step == recipe.max_steps:
            logged = self.last_loss = sum(self._losses) / len(self._losses)
            self._losses = []
        validation = self._validated()
        speed = self._samples / max(1e-9, time.monotonic() - (self._began or 0.0))
        if logged is not None:
            self._began, self._samples = time.monotonic(), 0
        return Progress(
            self.step,
            recipe.max_steps,
            loss,
            learning_rate,
            norm,
            speed,
            logged,
            divergence if self._lessons else None,
            validation,
        )

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside does not count as training when speed is told."""
        began = time.monotonic()
        yield
        if self._began is not None:
            self._began += time.monotonic() - began

    def _validated(self) -> float | None:
        """The loss on held-out rows, on steps that measure it."""
        recipe = self.recipe
        last = self.step == recipe.max_steps
        if self._validation is None or not (last or self.step % recipe.eval_steps == 0):
            return None
        with self.pause(), torch.no_grad():
            loss = self._validation(self._to_validate())
        self.validation_loss = loss
        if recipe.early_stopping:
            self._best.take(self.step, loss, self._learnt)
        return loss

    def due(self) -> tuple[list[Row], list[Lesson]]:
        """What the next step reads: rows of the task (ids, labels) and general ones."""
        recipe = self.recipe
        self._began = self._began or time.monotonic()
        numbers = rows_of_step(self.step, recipe.samples_per_step, len(self._examples), recipe.seed)
        general = rows_of_step(
            self.step, recipe.general_prompts_per_step, len(self._lessons), recipe.seed + 1
        )
        return (
            [self._examples[number] for number in numbers],
            [self._lessons[number] for number in general],
        )

    def _gradients(self, rows: list[Row], general: list[Lesson]) -> tuple[float, float]:
        """Those of a whole step, into what learns; returns (loss on the task, KL from the base on
        general prompts). Smaller micro-batches when memory runs out.
        """
        while True:
            random_state = training_state.random_state(self.loaded.device)
            try:
                return self._accumulate(rows, general)
            except torch.OutOfMemoryError as error:
                out_of_memory = str(error)
            if self.team.size > 1:  # the others cannot know
                raise TrainingFailed("out_of_memory", out_of_memory)
            self._optimizer.zero_grad(set_to_none=True)
            self.size.use_less(max(len(ids) for ids, _ in rows), len(rows), out_of_memory)
            training_state.set_random_state(random_state, self.loaded.device)

    def _update(self, loss: float, learning_rate: float) -> float:
        """One optimizer step; returns the gradient norm before clipping."""
        self._scaler.unscale_(self._optimizer)
        norm = self._clipped(self.recipe.max_grad_norm or math.inf)
        # An infinite gradient in float16 is what the scaler is there for: it skips the step and
        # lowers the scale.
        if not math.isfinite(loss) or (not math.isfinite(norm) and not self._scaler.is_enabled()):
            what = (
                f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
            )
            raise TrainingFailed(
                "loss_not_finite",
                f"step {self.step + 1}: {what} (learning rate {learning_rate:g}). Lower the "
                "learning rate, or use "
                "bfloat16 or float32.",
            )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return norm

    def weights(self, rows: list[Row], general: list[Lesson]) -> tuple[list[float], list[float]]:
        """What a token of each row of a step counts in the loss, scaled against underflow."""
        recipe, scale = self.recipe, self._scaler.get_scale()
        task = token_weights([labels for _, labels in rows], recipe.per_device_train_batch_size)
        held = token_weights([lesson.labels for lesson in general], max(1, len(general)))
        return [scale * one for one in task], [scale * recipe.kl_weight * one for one in held]

    def unscaled(self, task: float, divergence: float) -> tuple[float, float]:
        """(loss on the task, KL) of sums that were taken with `weights`."""
        scale = self._scaler.get_scale()
        return task / scale, divergence / scale / (self.recipe.kl_weight or 1.0)

    def _micro_batches(self, rows: list[Row], general: list[Lesson]) -> Iterator[MicroBatch]:
        """The task's rows in groups of similar length, then the general ones."""
        device = self.loaded.device
        weights, general_weights = self.weights(rows, general)
        for group in self._groups([len(ids) for ids, _ in rows]):
            yield MicroBatch.of(
                [rows[row] for row in group],
                [weights[row] for row in group],
                self.pad_id,
                device,
            )
        for group in self._groups([len(lesson.ids) for lesson in general]):
            chosen = [general[row] for row in group]
            yield MicroBatch.of(
                [(lesson.ids, lesson.labels) for lesson in chosen],
                [general_weights[row] for row in group],
                self.pad_id,
                device,
                top=[(lesson.top_ids, lesson.top_logprobs) for lesson in chosen],
            )

    def _groups(self, lengths: list[int]) -> list[list[int]]:
        """This process's micro-batches of a step's rows, by their numbers."""
        mine = self.team.share(lengths)
        groups = group_by_length(
            [lengths[row] for row in mine], self.size.tokens, self.size.overhead
        )
        return [[mine[row] for row in group] for group in groups]

    def state(self) -> dict[str, Any]:
        """Everything that `load_state` needs to go on as if nothing had happened; asked of all
        processes of a team.
        """
        return {
            "step": self.step,
            "encoder": self._learnt(),
            "optimizer": self._optimizer_state(),
            "scaler": self._scaler.state_dict(),
            "random": self.team.gathered(training_state.random_state(self.loaded.device)),
            "losses": self._losses,
            "micro_batch_tokens": self.size.tokens,
            "replay": self.size.replay,
            "best": self._best.state(),
            "last_loss": self.last_loss,
            "validation_loss": self.validation_loss,
            "identity": self._identity(),
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.as_dict(),
            "checkpoint_fingerprint": self.loaded.fingerprint,
            "examples": len(self._examples),
            "processes": self.team.size,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises TrainingFailed when it is another run's."""
        mine, theirs = self._identity(), state["identity"]
        # a state of an earlier version lacks the settings that came later, with their old meaning
        theirs.setdefault("processes", 1)
        theirs["recipe"] = Recipe.from_dict(theirs["recipe"]).as_dict()
        if mine != theirs:
            names = ", ".join(name for name in mine if mine[name] != theirs.get(name))
            raise TrainingFailed(
                "state_mismatch", f"the saved state belongs to another run: {names} differ"
            )
        self.step = state["step"]
        self._set_learnt(state["encoder"])
        self._set_optimizer_state(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._losses = state["losses"]
        self.size.tokens, self.size.replay = state["micro_batch_tokens"], state["replay"]
        if self._most_tokens is not None:  # perhaps there is less memory than there was
            self.size.tokens = min(self.size.tokens, self._most_tokens)
        self._best.load(state.get("best") or {})
        self.last_loss, self.validation_loss = state.get("last_loss"), state.get("validation_loss")
        random = state["random"]  # one a process; in an earlier version that of the only one
        own = random[self.team.rank] if isinstance(random, list) else random
        training_state.set_random_state(own, self.loaded.device)
