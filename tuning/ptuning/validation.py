"""How well a prefix predicts rows that it does not learn from, and when that gets no better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chat.engine.loading import Loaded
from tuning.ptuning.batches import MicroBatch, group_by_length
from tuning.ptuning.encoded import Encoded
from tuning.ptuning.recipe import Recipe

MOST_ROWS = 64  # the first of the split: a measurement is to cost about as much as a few steps


class Validation:
    """Mean loss per label token over held-out rows (ids, labels), all tokens counted alike."""

    def __init__(
        self,
        loss: Callable[..., torch.Tensor],
        rows: Sequence[tuple[list[int], list[int]]],
        pad_id: int,
        device: torch.device,
        *,
        tokens: int,
        overhead: int,
    ):
        """tokens, overhead: as of batches.group_by_length."""
        self._loss = loss
        lengths = [len(ids) for ids, _ in rows]
        self._batches = [
            MicroBatch.of([rows[row] for row in group], [1.0] * len(group), pad_id, device)
            for group in group_by_length(lengths, tokens, overhead)
        ]
        self._count = sum(len(batch.positions) for batch in self._batches)

    @torch.no_grad()
    def __call__(self, prefix: Any) -> float:
        """prefix [layers, 2, kv_heads, pre_seq_len, head_dim] in the model's dtype; None where
        weights learn.
        """
        total = sum(self._loss(batch, prefix, batch.weights).item() for batch in self._batches)
        return total / max(1, self._count)


def held_out(
    loss: Callable[..., torch.Tensor],
    loaded: Loaded,
    recipe: Recipe,
    rows: Sequence[dict[str, Any]],
    *,
    tokens: int,
    overhead: int,
) -> Validation | None:
    """Over the first rows {"prompt", "response", ...}; None where there are none to hold out."""
    some = Encoded(
        [rows[number] for number in range(min(len(rows), MOST_ROWS))],
        loaded.prompter,
        recipe.max_source_length,
        recipe.max_target_length,
    )
    if not len(some):
        return None
    return Validation(
        loss,
        [some[number] for number in range(len(some))],
        loaded.tokenizer.pad_token_id or 0,
        loaded.device,
        tokens=tokens,
        overhead=overhead,
    )


class BestStep:
    """The step with the lowest validation loss, and how often it has not been beaten since."""

    def __init__(self, patience: int):
        """patience: measurements without a better one after which a run ends; 0: never."""
        self.patience = patience
        self.step = self.waited = 0
        self.loss = float("inf")
        self.learnt: dict[str, torch.Tensor] | None = None

    def take(self, step: int, loss: float, learnt: Callable[[], dict[str, torch.Tensor]]) -> None:
        if loss < self.loss:
            self.step, self.loss, self.waited = step, loss, 0
            self.learnt = {name: t.detach().clone() for name, t in learnt().items()}
        else:
            self.waited += 1

    @property
    def ends(self) -> bool:
        return bool(self.patience) and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "waited": self.waited,
            "loss": self.loss,
            "encoder": self.learnt,
        }

    def load(self, state: dict[str, Any]) -> None:
        if state:
            self.step, self.waited, self.loss = state["step"], state["waited"], state["loss"]
            self.learnt = state["encoder"]
