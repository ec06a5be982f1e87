"""Which columns of the cache a query sees, as additive attention masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chat.engine.positions import PositionPlan


@dataclass(frozen=True)
class PrefixBias:
    """What rows add to the attention scores of their prefix's columns. columns, amount: [rows]."""

    columns: torch.Tensor
    amount: torch.Tensor

    @classmethod
    def of(cls, plans: Sequence[PositionPlan], device: torch.device) -> PrefixBias | None:
        """None where every prefix acts as it was trained: the ordinary mask, bit for bit."""
        if not any(plan.prefix_bias for plan in plans):
            return None
        return cls(
            torch.tensor([plan.prefix for plan in plans], device=device),
            torch.tensor([plan.prefix_bias for plan in plans], device=device),
        )

    def over(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, 1, 1, width], to be added to a mask of `width` columns."""
        own = torch.arange(width, device=self.columns.device)[None] < self.columns[:, None]
        return torch.where(own, self.amount[:, None], 0.0).to(dtype)[:, None, None]


def decode_mask(
    column_index: torch.Tensor, width: int, dtype: torch.dtype, bias: PrefixBias | None = None
) -> torch.Tensor:
    """Additive [rows, 1, 1, width]: a row sees its columns up to and including
    column_index[row].
    """
    hidden = torch.arange(width, device=column_index.device)[None] > column_index[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=column_index.device)
    mask = mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]
    return mask if bias is None else mask + bias.over(width, dtype)


def prefill_mask(
    plans: Sequence[PositionPlan],
    starts: Sequence[int],
    fresh: Sequence[int],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Additive [rows, 1, queries, width] of a prefill with right-aligned queries; starts and fresh
    as in KVCache.set_prefill_target.

    Padding queries see the columns of their row's first token, so that no softmax is empty.
    """
    queries = max(fresh)
    own = torch.tensor(
        [start + count - queries for start, count in zip(starts, fresh, strict=True)], device=device
    )
    # [rows, queries] column of each query
    own = own[:, None] + torch.arange(queries, device=device)
    own = own.maximum(torch.tensor(starts, device=device)[:, None])
    shared = torch.tensor([plan.prefix + plan.context for plan in plans], device=device)
    last_seen = own.maximum(shared[:, None] - 1)
    hidden = torch.arange(width, device=device)[None, None] > last_seen[..., None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    mask = mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
    bias = PrefixBias.of(plans, device)
    return mask if bias is None else mask + bias.over(width, dtype)
