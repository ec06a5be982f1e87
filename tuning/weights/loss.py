"""The loss where weights learn: as behind a prefix, with logits only where there are labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tuning.ptuning.batches import MicroBatch
from tuning.ptuning.loss import LOGITS_BYTES, Goal


class WeightsLoss(nn.Module):
    """Weighted loss of a micro-batch, summed in float32. A module, so that whatever shares its
    weights out over processes (FSDP) sees one forward.

    The output layer learns too, so its logits are not dropped but computed again on the way back,
    some rows at a time.
    """

    def __init__(self, model: Any, probe: torch.Tensor):
        """probe [1, length]: token ids of one example, by which it is found out whether the model's
        logits are its output layer on its last hidden state and nothing else.
        """
        super().__init__()
        self.model = model
        self._is_plain = self._plain(probe)
        most = LOGITS_BYTES.get(probe.device.type, 512 << 20)
        self._rows = max(1, most // (4 * model.get_input_embeddings().weight.shape[0]))

    @torch.no_grad()
    def _plain(self, probe: torch.Tensor) -> bool:
        head = self.model.get_output_embeddings()
        if head is None or self.model.base_model is self.model:
            return False
        hidden = self.model.base_model(input_ids=probe, use_cache=False).last_hidden_state
        if hidden.shape[:2] != probe.shape:
            return False
        logits = self.model(input_ids=probe, use_cache=False).logits.float()
        room = 1e-3 * logits.abs().max().item()
        return torch.allclose(head(hidden).float(), logits, rtol=1e-3, atol=room)

    def forward(self, batch: MicroBatch, prefix: None, weights: torch.Tensor) -> torch.Tensor:
        """Scalar; weights [n]. prefix: there is none (PrefixLoss is called the same way)."""
        device = batch.input_ids.device
        goal = Goal(batch, device)
        if not self._is_plain:
            logits = self.model(input_ids=batch.input_ids, use_cache=False).logits
            some = logits.flatten(0, 1)[batch.positions]
            return (goal.losses(some) * weights).sum()
        hidden = self.model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        some = hidden.flatten(0, 1)[batch.positions]
        head = self.model.get_output_embeddings()

        def of(rows: torch.Tensor, part: slice) -> torch.Tensor:
            return (goal.losses(head(rows), part) * weights[part]).sum()

        total = torch.zeros((), device=device)
        for start in range(0, len(some), self._rows):
            part = slice(start, start + self._rows)
            if len(some) <= self._rows:
                total = total + of(some, part)
            else:
                total = total + checkpoint(of, some[part], part, use_reentrant=False)
        return total
