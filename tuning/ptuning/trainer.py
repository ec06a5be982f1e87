"""The training loop of P-tuning v2: only the prefix learns, the base model is frozen.

Our own loop rather than transformers' Trainer: logits only where there are labels, micro-batches
grouped by length, a stop between any two steps, and a resume that is bit for bit what an
uninterrupted run would have computed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chat.engine.adapters import KVPrefix
from chat.engine.capacity import free_memory
from chat.engine.loading import Loaded
from tuning.ptuning import training_state
from tuning.ptuning.batches import Encoded, MicroBatch, group_by_length, rows_of_step, token_weights
from tuning.ptuning.general_prompts import GENERAL_PROMPTS
from tuning.ptuning.initial import TextTooLong, keys_and_values, text_ids
from tuning.ptuning.loss import PrefixLoss, decoder_layers, gradient_checkpointing
from tuning.ptuning.prefix import PrefixEncoder
from tuning.ptuning.recipe import METHOD, Recipe
from tuning.ptuning.teacher import Lesson, lessons

logger = logging.getLogger(__name__)

# On a CPU larger micro-batches than this hardly gain speed, only memory (tests/bench/tuning.py).
_ENOUGH_BYTES = {"cpu": 256 << 20}


class TrainingFailed(Exception):
    """The run cannot go on and would fail again. `code`: loss_not_finite | no_examples |
    does_not_fit | out_of_memory | state_mismatch | init_text_too_long | no_general_answers.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Stopped(Exception):
    """`report` asked to stop; the state after `step` is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass(frozen=True)
class Progress:
    """What `report` is told after each step. `logged` is the mean loss since the last logged step,
    on logged steps only.
    """

    step: int  # updates done
    max_steps: int
    loss: float  # of this update
    learning_rate: float  # used in this update
    gradient_norm: float  # before clipping
    samples_per_second: float | None  # over the logging interval; None until it can be told
    logged: float | None = None
    divergence: float | None = None  # KL(base || prefixed) of this update's general prompts


# a true answer asks the trainer to save its state and stop
Report = Callable[[Progress], object]


class Trainer:
    """One run: `Trainer(...).train()` returns the KV prefix, or raises TrainingFailed or Stopped.

    examples: random access to rows {"prompt", "response", "history"}. state_folder: where the
    run resumes from and saves every `save_steps` steps; None: nowhere. micro_batch_tokens: padded
    tokens of one forward; None: from free memory. Changes speed and memory, not the mathematics.
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
        micro_batch_tokens: int | None = None,
        general_prompts: Sequence[str] = GENERAL_PROMPTS,
        general_folder: Path | None = None,
    ):
        self.loaded, self.recipe = loaded, recipe
        self._folder, self._report = state_folder, report or (lambda progress: None)
        self._examples = Encoded(
            examples, loaded.prompter, recipe.max_source_length, recipe.max_target_length
        )
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
        self._begin(examples)
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
        self._replay = False  # gradient checkpointing, when memory asks for it
        self._tokens = micro_batch_tokens or self._tokens_that_fit()
        self.step = 0
        self._losses: list[float] = []  # since the last logged step
        self._lessons: list[Lesson] = []
        if recipe.kl_weight:
            self._lessons = lessons(
                loaded,
                _spread(general_prompts, recipe.max_steps * recipe.general_prompts_per_step),
                max_source_length=recipe.max_source_length,
                max_target_length=recipe.max_target_length,
                folder=general_folder,
            )
            if not self._lessons:
                message = "the base answers none of the general prompts that kl_weight needs"
                raise TrainingFailed("no_general_answers", message)
        self._resume()

    def _begin(self, examples: Sequence[dict[str, Any]]) -> None:
        """The prefix before the first step, as the recipe's `init` says."""
        recipe, loaded = self.recipe, self.loaded
        if recipe.init == "zero":
            torch.nn.init.zeros_(self.encoder.embedding.weight)
        elif recipe.init == "prompt":
            whole = (examples[number] for number in range(len(examples)))
            shown = (row for row in whole if row["prompt"].strip() and row["response"].strip())
            try:
                ids = text_ids(loaded, recipe.init_text, shown, recipe.pre_seq_len)
            except TextTooLong as fault:
                raise TrainingFailed("init_text_too_long", str(fault)) from fault
            self.encoder.begin_with(keys_and_values(loaded, ids))

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.encoder.parameters())

    def train(self) -> KVPrefix:
        """Runs from `step`, where the newest saved state left off, to max_steps."""
        recipe, self._began, self._samples = self.recipe, time.monotonic(), 0
        while self.step < recipe.max_steps:
            learning_rate = recipe.learning_rate_at(self.step)
            loss, divergence, norm = self._update(learning_rate)
            self.step += 1
            self._losses.append(loss)
            self._samples += recipe.samples_per_step
            logged = None
            if self.step % recipe.logging_steps == 0 or self.step == recipe.max_steps:
                logged = sum(self._losses) / len(self._losses)
                self._losses = []
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
                )
            )
            done = self.step == recipe.max_steps
            if logged is not None:
                self._began, self._samples = time.monotonic(), 0
            if self._folder is not None and (stop or done or self.step % recipe.save_steps == 0):
                began = time.monotonic()
                self._save()
                self._began += time.monotonic() - began
            if stop and not done:
                raise Stopped(self.step)
        return self.kv_prefix()

    @torch.no_grad()
    def kv_prefix(self) -> KVPrefix:
        """What has been learnt so far, in the dtype in which the base model saw it."""
        return KVPrefix(
            tensor=self.encoder().to(self.loaded.dtype).cpu().contiguous(),
            shifts_positions=self.loaded.shifts_positions,
            checkpoint_fingerprint=self.loaded.fingerprint,
            metadata={"method": METHOD, "step": self.step, "recipe": self.recipe.as_dict()},
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
            random_state = _random_state(self.loaded.device)
            try:
                loss, divergence = self._accumulate(rows, general)
                break
            except torch.OutOfMemoryError as error:
                out_of_memory = str(error)
            self._use_less_memory(rows, out_of_memory)
            _set_random_state(random_state, self.loaded.device)
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
        for group in group_by_length([len(ids) for ids, _ in rows], self._tokens, self._overhead):
            yield MicroBatch.of(
                [rows[row] for row in group],
                [weights[row] for row in group],
                self._pad_id,
                device,
            )
        weights = token_weights([lesson.labels for lesson in general], max(1, len(general)))
        lengths = [len(lesson.ids) for lesson in general]
        for group in group_by_length(lengths, self._tokens, self._overhead):
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
        with gradient_checkpointing(self._layers, self._replay):
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

    @property
    def _overhead(self) -> int:
        """What one more micro-batch costs, in tokens: a GPU is idle on small ones, a CPU hardly
        minds.
        """
        return 96 if self.loaded.device.type == "cpu" else 2048

    def _tokens_that_fit(self) -> int:
        """Padded tokens of one forward whose activations take about half of the free memory; never
        less than one example.
        """
        config, device = self.loaded.model.config.get_text_config(), self.loaded.device
        free = free_memory(device)
        inner = getattr(config, "intermediate_size", None) or getattr(
            config, "inner_hidden_size", None
        )
        inner = inner or 4 * config.hidden_size
        # Kept for the backward pass, per token and layer: about 12 vectors of the hidden size and 4
        # of the inner one.
        per_token = (
            self.loaded.layers * (12 * config.hidden_size + 4 * inner) * self.loaded.dtype.itemsize
        )
        keys = (
            2
            * self.loaded.layers
            * self.loaded.kv_heads
            * self.loaded.head_dim
            * self.loaded.dtype.itemsize
        )
        longest = self.recipe.max_source_length + self.recipe.max_target_length
        per_example = longest * per_token + self.recipe.pre_seq_len * keys
        room = free // 2
        self._replay = room < per_example
        return int(max(1, min(room, _ENOUGH_BYTES.get(device.type, room)) / per_example) * longest)

    def _use_less_memory(self, rows: list[tuple[list[int], list[int]]], reason: str) -> None:
        """After running out of memory: smaller micro-batches, then gradient checkpointing, then
        give up.
        """
        longest = max(len(ids) for ids, _ in rows)
        self._optimizer.zero_grad(set_to_none=True)
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._tokens > longest:
            self._tokens = max(longest, min(self._tokens, longest * len(rows)) // 2)
        elif not self._replay:
            self._replay = True
        else:
            raise TrainingFailed(
                "out_of_memory", f"one example of {longest} tokens does not fit: {reason}"
            )
        logger.warning(
            "out of memory: going on with micro-batches of %d tokens%s",
            self._tokens,
            " and gradient checkpointing" if self._replay else "",
        )

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
                "random": _random_state(self.loaded.device),
                "losses": self._losses,
                "micro_batch_tokens": self._tokens,
                "replay": self._replay,
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
        self._tokens, self._replay = state["micro_batch_tokens"], state["replay"]
        _set_random_state(state["random"], self.loaded.device)


def _spread(prompts: Sequence[str], most: int) -> Sequence[str]:
    """At most `most` of the prompts, from all over the list: more than a short run will read need
    no answers.
    """
    if most >= len(prompts):
        return prompts
    return [prompts[number * len(prompts) // most] for number in range(most)]


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
