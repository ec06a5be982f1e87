"""How well a prefix predicts rows that it does not learn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tuning.ptuning.batches import MicroBatch, group_by_length
from tuning.ptuning.loss import PrefixLoss


class Validation:
    """Mean loss per label token over held-out rows (ids, labels), all tokens counted alike."""

    def __init__(
        self,
        loss: PrefixLoss,
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
    def __call__(self, prefix: torch.Tensor) -> float:
        """prefix [layers, 2, kv_heads, pre_seq_len, head_dim] in the model's dtype."""
        total = sum(self._loss(batch, prefix, batch.weights).item() for batch in self._batches)
        return total / max(1, self._count)
