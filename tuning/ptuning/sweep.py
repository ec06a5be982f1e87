"""Several prefixes that learn side by side over one frozen base: a step of all of them is one batch
whose rows stand behind different prefixes.

Each learns what it would have learnt alone: it keeps its own data order, optimizer, schedule and
random generators, and no row sees another's prefix. What is shared is the base in memory and the
work that a forward costs whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import dropout

from chat.engine.adapters import KVPrefix
from tuning.ptuning import training_state
from tuning.ptuning.batches import MicroBatch, group_by_length
from tuning.ptuning.loop import Row
from tuning.ptuning.loss import gradient_checkpointing
from tuning.ptuning.progress import Progress, Stopped, TrainingFailed
from tuning.ptuning.teacher import Lesson
from tuning.ptuning.trainer import Trainer

# given (which variant, its step); a true answer asks to save and stop
ReportVariant = Callable[[int, Progress], object]


@dataclass
class _Line:
    """One row of a joint batch: a row of the task, or a general one with its `lesson`. member:
    which of the step's trainers it belongs to. kept: dropout's mask over its prefix.
    """

    member: int
    ids: list[int]
    labels: list[int]
    weight: float
    lesson: Lesson | None
    kept: torch.Tensor | None


class Sweep:
    """`Sweep(trainers).train()` returns a prefix for each variant, or None for one that diverged
    (`failures` says why) while others went on.

    trainers: one a variant, over the same base and with the same numbers of steps and of examples
    a step; made without a state folder, for the sweep saves all of them as one state.
    """

    def __init__(
        self,
        trainers: Sequence[Callable[[], Trainer]],
        state_folder: str | Path | None = None,
        report: ReportVariant | None = None,
    ):
        """trainers: makes them, one after the other, each with its own random generators."""
        self._random = []
        self.trainers: list[Trainer] = []
        for make in trainers:
            trainer = make()
            self.trainers.append(trainer)
            self._random.append(training_state.random_state(trainer.loaded.device))
        self._folder, self._report = state_folder, report or (lambda number, progress: None)
        self.failures: dict[int, TrainingFailed] = {}
        self.step = 0
        self._resume()

    @property
    def trainable_parameters(self) -> int:
        return sum(trainer.trainable_parameters for trainer in self.trainers)

    def train(self) -> list[KVPrefix | None]:
        save_steps = self.trainers[0].recipe.save_steps
        while active := self._active():
            told = self._gradients(active)
            stop = False
            for number, losses in zip(active, told, strict=True):
                try:
                    progress = self.trainers[number].advance(*losses)
                except TrainingFailed as fault:
                    self.failures[number] = fault
                else:
                    stop = bool(self._report(number, progress)) or stop
            self.step += 1
            done = not self._active()
            if self._folder is not None and (stop or done or self.step % save_steps == 0):
                self._save()
            if stop and not done:
                raise Stopped(self.step)
        if len(self.failures) == len(self.trainers):
            raise self.failures[0]
        return [
            None if number in self.failures else trainer.result()
            for number, trainer in enumerate(self.trainers)
        ]

    def _active(self) -> list[int]:
        return [
            number
            for number, trainer in enumerate(self.trainers)
            if not trainer.ended and number not in self.failures
        ]

    # -- one step

    def _gradients(self, active: list[int]) -> list[tuple[float, float]]:
        """A step's gradients into each encoder; (loss on the task, KL) of each."""
        members = [self.trainers[number] for number in active]
        due = [trainer.due() for trainer in members]
        size = self.trainers[0].size
        while True:
            before = [dict(self._random[number]) for number in active]
            try:
                return self._accumulate(active, due)
            except torch.OutOfMemoryError as error:
                out_of_memory = str(error)
            for trainer in members:
                trainer.encoder.zero_grad(set_to_none=True)
            rows = [row for task, _ in due for row in task]
            size.use_less(max(len(ids) for ids, _ in rows), len(rows), out_of_memory)
            for number, state in zip(active, before, strict=True):
                self._random[number] = state

    def _accumulate(
        self, active: list[int], due: list[tuple[list[Row], list[Lesson]]]
    ) -> list[tuple[float, float]]:
        first = self.trainers[0]
        told: list[tuple[float, float]] = [(0.0, 0.0)] * len(active)
        # rows of one forward have prefixes of one length
        lengths = sorted({self.trainers[number].recipe.pre_seq_len for number in active})
        for length in lengths:
            places = [
                place
                for place, number in enumerate(active)
                if self.trainers[number].recipe.pre_seq_len == length
            ]
            members = [self.trainers[active[place]] for place in places]
            lines = [
                line
                for member, place in enumerate(places)
                for line in self._lines(member, active[place], *due[place])
            ]
            prefixes = []
            for trainer in members:
                trainer.encoder.zero_grad(set_to_none=True)
                prefixes.append(trainer.encoder())
            leaf = torch.stack([prefix.detach().to(first.loaded.dtype) for prefix in prefixes])
            leaf.requires_grad_()
            gradients = torch.zeros(leaf.shape, device=leaf.device)
            total = torch.zeros(2, len(members), device=leaf.device)
            with gradient_checkpointing(first.layers, first.size.replay):
                for batch, kept in self._micro_batches(lines):
                    assert batch.behind is not None
                    rows = leaf.index_select(0, batch.behind).permute(1, 2, 0, 3, 4, 5)
                    if kept is not None:
                        rows = rows * kept
                    losses = first.loss(batch, rows, batch.weights, count=len(members))
                    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
                    gradients += gradient
                    total[int(batch.top_ids is not None)] += losses.detach().to(total.device)
            for member, (place, prefix) in enumerate(zip(places, prefixes, strict=True)):
                prefix.backward(gradients[member])
                told[place] = members[member].unscaled(*total[:, member].tolist())
        return told

    def _lines(
        self, member: int, number: int, rows: list[Row], general: list[Lesson]
    ) -> Iterator[_Line]:
        trainer = self.trainers[number]
        task_weights, general_weights = trainer.weights(rows, general)
        kept = self._kept(number, rows, general)
        for row, weight, mask in zip(rows, task_weights, kept, strict=False):
            yield _Line(member, *row, weight, None, mask)
        for lesson, weight, mask in zip(general, general_weights, kept[len(rows) :], strict=True):
            yield _Line(member, lesson.ids, lesson.labels, weight, lesson, mask)

    def _kept(
        self, number: int, rows: list[Row], general: list[Lesson]
    ) -> Sequence[torch.Tensor | None]:
        """Dropout's scaled mask over each row's prefix, drawn as the variant alone would draw it:
        micro-batch after micro-batch, from its own generator.
        """
        trainer = self.trainers[number]
        rate = trainer.recipe.prefix_dropout
        if not rate:
            return [None] * (len(rows) + len(general))
        device = trainer.loaded.device
        training_state.set_random_state(self._random[number], device)
        prefix = trainer.encoder().detach()
        ones = torch.ones_like(prefix.to(trainer.loaded.dtype))
        kept: list[torch.Tensor | None] = []
        for lengths in ([len(ids) for ids, _ in rows], [len(lesson.ids) for lesson in general]):
            masks: list[torch.Tensor | None] = [None] * len(lengths)
            for group in group_by_length(lengths, trainer.size.tokens, trainer.size.overhead):
                drawn = dropout(ones.unsqueeze(2).expand(-1, -1, len(group), -1, -1, -1), rate)
                for place, row in enumerate(group):
                    masks[row] = drawn[:, :, place]
            kept += masks
        self._random[number] = training_state.random_state(device)
        return kept

    def _micro_batches(
        self, lines: list[_Line]
    ) -> Iterator[tuple[MicroBatch, torch.Tensor | None]]:
        """(batch, dropout's masks [layers, 2, rows, kv_heads, pre_seq_len, head_dim] or None):
        lines of all variants in groups of similar length, the task's first.
        """
        first = self.trainers[0]
        device = first.loaded.device
        for general in (False, True):
            some = [line for line in lines if (line.lesson is not None) == general]
            lengths = [len(line.ids) for line in some]
            for group in group_by_length(lengths, first.size.tokens, first.size.overhead):
                chosen = [some[row] for row in group]
                batch = MicroBatch.of(
                    [(line.ids, line.labels) for line in chosen],
                    [line.weight for line in chosen],
                    first.pad_id,
                    device,
                    top=[
                        (line.lesson.top_ids, line.lesson.top_logprobs)
                        for line in chosen
                        if line.lesson is not None
                    ]
                    if general
                    else None,
                )
                batch.behind = torch.tensor([line.member for line in chosen], device=device)
                masks = [line.kept for line in chosen]
                yield batch, _stacked(masks)

    # -- what is kept on the way

    def _save(self) -> None:
        assert self._folder is not None
        training_state.save(
            self._folder,
            self.step,
            {
                "step": self.step,
                "variants": [trainer.state() for trainer in self.trainers],
                "random": self._random,
                "failures": {
                    number: [fault.code, str(fault)] for number, fault in self.failures.items()
                },
            },
        )

    def _resume(self) -> None:
        device = self.trainers[0].loaded.device
        state = training_state.load_newest(self._folder, device) if self._folder else None
        if state is None:
            return
        if len(state.get("variants", ())) != len(self.trainers):
            raise TrainingFailed("state_mismatch", "the saved state is of another sweep")
        for trainer, saved in zip(self.trainers, state["variants"], strict=True):
            trainer.load_state(saved)
        self.step, self._random = state["step"], state["random"]
        self.failures = {
            number: TrainingFailed(code, message)
            for number, (code, message) in state["failures"].items()
        }


def _stacked(masks: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """None where no row has one; a variant without dropout keeps everything."""
    some = next((mask for mask in masks if mask is not None), None)
    if some is None:
        return None
    return torch.stack([torch.ones_like(some) if mask is None else mask for mask in masks], dim=2)
