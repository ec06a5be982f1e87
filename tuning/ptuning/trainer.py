"""The training loop of P-tuning v2: only the prefix learns, the base model is frozen.

Our own loop rather than transformers' Trainer: logits only where there are labels, micro-batches
grouped by length, a stop between any two steps, and a resume that is bit for bit what an
uninterrupted run would have computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from chat.engine.adapters import KVPrefix
from chat.engine.loading import Loaded
from tuning.ptuning import training_state
from tuning.ptuning.batches import MicroBatch, group_by_length, rows_of_step, token_weights
from tuning.ptuning.encoded import Encoded, TooLong
from tuning.ptuning.general_prompts import GENERAL_PROMPTS
from tuning.ptuning.initial import TextTooLong, keys_and_values, text_ids
from tuning.ptuning.loss import PrefixLoss, decoder_layers, gradient_checkpointing
from tuning.ptuning.memory import MicroBatchSize
from tuning.ptuning.prefix import PrefixEncoder
from tuning.ptuning.progress import Progress, Report, Stopped, TrainingFailed
from tuning.ptuning.recipe import METHOD, Recipe
from tuning.ptuning.teacher import Lesson, lessons, spread
from tuning.ptuning.validation import MOST_ROWS, BestStep, Validation

__all__ = ["Progress", "Report", "Stopped", "Trainer", "TrainingFailed"]


class Trainer:
    """One run: `Trainer(...).train()` returns the KV prefix, or raises TrainingFailed or Stopped.

    examples: random access to rows {"prompt", "response", "history"}. state_folder: where the
    run resumes from and saves every `save_steps` steps; None: nowhere. micro_batch_tokens: padded
    tokens of one forward; None: from free memory. Changes speed and memory, not the mathematics.
    initial: the prefix to go on from, where the recipe's init is an adapter.
    validation: rows like the examples that are not learnt from; measured every `eval_steps` steps.
    keep: given (step, prefix) of each saved step.
    general_prompts: what the base is asked when the recipe has a kl_weight; general_folder: where
    its answers are kept.
    """

    def __init__(
        self,
        loaded: Loaded,
        recipe: Recipe,
        examples: Sequence[dict[str, Any]],
        state_folder: str | Path | None = None,
        report: Report | None = None,
        *,
        initial: torch.Tensor | None = None,
        validation: Sequence[dict[str, Any]] = (),
        keep: Callable[[int, KVPrefix], object] | None = None,
        micro_batch_tokens: int | None = None,
        general_prompts: Sequence[str] = GENERAL_PROMPTS,
        general_folder: Path | None = None,
    ):
        self.loaded, self.recipe = loaded, recipe
        self._folder, self._report = state_folder, report or (lambda progress: None)
        self._keep = keep or (lambda step, prefix: None)
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
            raise ValueError("the base model must be frozen: only the prefix is trained")
        longest = recipe.max_source_length + recipe.max_target_length
        longest += recipe.pre_seq_len if loaded.shifts_positions else 0
        if longest > loaded.context_length:
            message = (
                f"prefix, source and target need {longest} positions, "
                f"the checkpoint has {loaded.context_length}"
            )
            raise TrainingFailed("does_not_fit", message)
        torch.manual_seed(recipe.seed)
        text_config = loaded.model.config.get_text_config()
        self.encoder = PrefixEncoder(
            pre_seq_len=recipe.pre_seq_len,
            layers=loaded.layers,
            kv_heads=loaded.kv_heads,
            head_dim=loaded.head_dim,
            projection=recipe.prefix_projection,
            hidden_size=text_config.hidden_size,
            freeze_first=recipe.freeze_first,
        )
        self._begin(examples, initial)
        self.encoder.to(loaded.device)
        self._optimizer = torch.optim.AdamW(
            self.encoder.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        # The prefix is float32; in float16 what flows back to it through the base would underflow
        # without a scale.
        self._scaler = torch.amp.GradScaler(
            loaded.device.type, enabled=loaded.dtype == torch.float16
        )
        self._layers = decoder_layers(loaded.model, loaded.layers)
        probe = torch.tensor([self._examples[0][0]], device=loaded.device)
        self._loss = PrefixLoss(loaded.model, probe)
        self._pad_id = loaded.tokenizer.pad_token_id or 0
        self._most_tokens = micro_batch_tokens
        self._size = MicroBatchSize(
            loaded,
            recipe.max_source_length + recipe.max_target_length,
            recipe.pre_seq_len,
            micro_batch_tokens,
        )
        self.step = 0
        self._best = BestStep(recipe.early_stopping)
        self._validation = self._held_out(validation) if recipe.eval_steps else None
        self._losses: list[float] = []  # since the last logged step
        self._lessons: list[Lesson] = []
        if recipe.kl_weight:
            self._lessons = lessons(
                loaded,
                spread(general_prompts, recipe.max_steps * recipe.general_prompts_per_step),
                max_source_length=recipe.max_source_length,
                max_target_length=recipe.max_target_length,
                folder=general_folder,
            )
            if not self._lessons:
                message = "the base answers none of the general prompts that kl_weight needs"
                raise TrainingFailed("no_general_answers", message)
        self._resume()

    def _begin(self, examples: Sequence[dict[str, Any]], initial: torch.Tensor | None) -> None:
        """The prefix before the first step, as the recipe's `init` says."""
        recipe, loaded = self.recipe, self.loaded
        if recipe.init == "zero":
            torch.nn.init.zeros_(self.encoder.embedding.weight)
        elif recipe.init == "adapter":
            wanted = self.encoder().shape
            if initial is None or initial.shape != wanted:
                found = "none" if initial is None else list(initial.shape)
                message = f"the prefix to go on from is {found}, this run's is {list(wanted)}"
                raise TrainingFailed("no_adapter_to_go_on_from", message)
            self.encoder.begin_with(initial.float())
        elif recipe.init == "prompt":
            whole = (examples[number] for number in range(len(examples)))
            shown = (row for row in whole if row["prompt"].strip() and row["response"].strip())
            try:
                ids = text_ids(loaded, recipe.init_text, shown, recipe.pre_seq_len)
            except TextTooLong as fault:
                raise TrainingFailed("init_text_too_long", str(fault)) from fault
            self.encoder.begin_with(keys_and_values(loaded, ids))

    def _held_out(self, rows: Sequence[dict[str, Any]]) -> Validation | None:
        """None where there are no rows to hold out."""
        recipe, loaded = self.recipe, self.loaded
        some = Encoded(
            [rows[number] for number in range(min(len(rows), MOST_ROWS))],
            loaded.prompter,
            recipe.max_source_length,
            recipe.max_target_length,
        )
        if not len(some):
            return None
        return Validation(
            self._loss,
            [some[number] for number in range(len(some))],
            self._pad_id,
            loaded.device,
            tokens=self._size.tokens,
            overhead=self._size.overhead,
        )

    @property
    def best_step(self) -> int:
        """The step that `train` returns the prefix of."""
        return self._best.step if self._best.patience and self._best.step else self.step

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.encoder.parameters())

    def train(self) -> KVPrefix:
        """Runs from `step`, where the newest saved state left off, to max_steps; or, with
        early_stopping, until the validation loss gets no better, and returns the best step's.
        """
        recipe, self._began, self._samples = self.recipe, time.monotonic(), 0
        while self.step < recipe.max_steps and not self._best.ends:
            learning_rate = recipe.learning_rate_at(self.step)
            loss, divergence, norm = self._update(learning_rate)
            self.step += 1
            self._losses.append(loss)
            self._samples += recipe.samples_per_step
            logged = None
            if self.step % recipe.logging_steps == 0 or self.step == recipe.max_steps:
                logged = sum(self._losses) / len(self._losses)
                self._losses = []
            validation = self._validated()
            speed = self._samples / max(1e-9, time.monotonic() - self._began)
            stop = self._report(
                Progress(
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
            )
            done = self.step == recipe.max_steps or self._best.ends
            if logged is not None:
                self._began, self._samples = time.monotonic(), 0
            if self._folder is not None and (stop or done or self.step % recipe.save_steps == 0):
                began = time.monotonic()
                self._save()
                self._keep(self.step, self.kv_prefix())
                self._began += time.monotonic() - began
            if stop and not done:
                raise Stopped(self.step)
        if self._best.patience and self._best.encoder is not None:
            self.encoder.load_state_dict(self._best.encoder)
        return self.kv_prefix()

    def _validated(self) -> float | None:
        """The loss on held-out rows, on steps that measure it."""
        recipe = self.recipe
        last = self.step == recipe.max_steps
        if self._validation is None or not (last or self.step % recipe.eval_steps == 0):
            return None
        began = time.monotonic()
        with torch.no_grad():
            loss = self._validation(self.encoder().to(self.loaded.dtype))
        if recipe.early_stopping:
            self._best.take(self.step, loss, self.encoder)
        self._began += time.monotonic() - began  # speed is that of training
        return loss

    @torch.no_grad()
    def kv_prefix(self) -> KVPrefix:
        """What has been learnt so far, in the dtype in which the base model saw it."""
        return KVPrefix(
            tensor=self.encoder().to(self.loaded.dtype).cpu().contiguous(),
            shifts_positions=self.loaded.shifts_positions,
            checkpoint_fingerprint=self.loaded.fingerprint,
            metadata={"method": METHOD, "step": self.best_step, "recipe": self.recipe.as_dict()},
        )

    def _update(self, learning_rate: float) -> tuple[float, float, float]:
        """One optimizer step; returns (loss on the task, KL from the base on general prompts,
        gradient norm before clipping).
        """
        recipe = self.recipe
        numbers = rows_of_step(self.step, recipe.samples_per_step, len(self._examples), recipe.seed)
        rows = [self._examples[number] for number in numbers]
        general = [
            self._lessons[number]
            for number in rows_of_step(
                self.step, recipe.general_prompts_per_step, len(self._lessons), recipe.seed + 1
            )
        ]
        while True:
            random_state = training_state.random_state(self.loaded.device)
            try:
                loss, divergence = self._accumulate(rows, general)
                break
            except torch.OutOfMemoryError as error:
                out_of_memory = str(error)
            self._optimizer.zero_grad(set_to_none=True)
            self._size.use_less(max(len(ids) for ids, _ in rows), len(rows), out_of_memory)
            training_state.set_random_state(random_state, self.loaded.device)
        self._scaler.unscale_(self._optimizer)
        limit = recipe.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), limit).item()
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
        return loss, divergence, norm

    def _micro_batches(
        self, rows: list[tuple[list[int], list[int]]], general: list[Lesson]
    ) -> Iterator[MicroBatch]:
        """The task's rows in groups of similar length, then the general ones."""
        recipe, device = self.recipe, self.loaded.device
        weights = token_weights([labels for _, labels in rows], recipe.per_device_train_batch_size)
        for group in group_by_length(
            [len(ids) for ids, _ in rows], self._size.tokens, self._size.overhead
        ):
            yield MicroBatch.of(
                [rows[row] for row in group],
                [weights[row] for row in group],
                self._pad_id,
                device,
            )
        weights = token_weights([lesson.labels for lesson in general], max(1, len(general)))
        lengths = [len(lesson.ids) for lesson in general]
        for group in group_by_length(lengths, self._size.tokens, self._size.overhead):
            chosen = [general[row] for row in group]
            yield MicroBatch.of(
                [(lesson.ids, lesson.labels) for lesson in chosen],
                [recipe.kl_weight * weights[row] for row in group],
                self._pad_id,
                device,
                top=[(lesson.top_ids, lesson.top_logprobs) for lesson in chosen],
            )

    def _accumulate(
        self, rows: list[tuple[list[int], list[int]]], general: list[Lesson]
    ) -> tuple[float, float]:
        """Gradients of a whole step into the encoder's .grad; returns (loss on the task, KL)."""
        self._optimizer.zero_grad(set_to_none=True)
        prefix = self.encoder()
        # Micro-batches add their gradients up at this leaf; the encoder's own backward runs once.
        leaf = prefix.detach().to(self.loaded.dtype).requires_grad_()
        total = torch.zeros(2, device=self.loaded.device)
        leaf_gradient = torch.zeros_like(prefix)
        with gradient_checkpointing(self._layers, self._size.replay):
            for batch in self._micro_batches(rows, general):
                loss = self._loss(
                    batch, leaf, self._scaler.scale(batch.weights), self.recipe.prefix_dropout
                )
                (gradient,) = torch.autograd.grad(loss, leaf)
                leaf_gradient += gradient
                total[int(batch.top_ids is not None)] += loss.detach().to(total.device)
        prefix.backward(leaf_gradient)
        task, divergence = (total / self._scaler.get_scale()).tolist()
        return task, divergence / (self.recipe.kl_weight or 1.0)

    def _save(self) -> None:
        assert self._folder is not None
        training_state.save(
            self._folder,
            self.step,
            {
                "step": self.step,
                "encoder": self.encoder.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "scaler": self._scaler.state_dict(),
                "random": training_state.random_state(self.loaded.device),
                "losses": self._losses,
                "micro_batch_tokens": self._size.tokens,
                "replay": self._size.replay,
                "best": self._best.state(),
                "identity": self._identity(),
            },
        )

    def _identity(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.as_dict(),
            "checkpoint_fingerprint": self.loaded.fingerprint,
            "examples": len(self._examples),
        }

    def _resume(self) -> None:
        state = (
            training_state.load_newest(self._folder, self.loaded.device)
            if self._folder is not None
            else None
        )
        if state is None:
            return
        mine, theirs = self._identity(), state["identity"]
        # a state of an earlier version lacks the settings that came later, with their old meaning
        theirs["recipe"] = Recipe.from_dict(theirs["recipe"]).as_dict()
        if mine != theirs:
            names = ", ".join(name for name in mine if mine[name] != theirs.get(name))
            raise TrainingFailed(
                "state_mismatch", f"the saved state belongs to another run: {names} differ"
            )
        self.step = state["step"]
        self.encoder.load_state_dict(state["encoder"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._losses = state["losses"]
        self._size.tokens, self._size.replay = state["micro_batch_tokens"], state["replay"]
        if self._most_tokens is not None:  # perhaps there is less memory than there was
            self._size.tokens = min(self._size.tokens, self._most_tokens)
        self._best.load(state.get("best") or {})
        training_state.set_random_state(state["random"], self.loaded.device)
