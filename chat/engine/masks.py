"""Which columns of the cache a query sees, as additive attention masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chat.engine.positions import PositionPlan


def decode_mask(column_index: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive [rows, 1, 1, width]: a row sees its columns up to and including
    column_index[row].
    """
    hidden = torch.arange(width, device=column_index.device)[None] > column_index[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=column_index.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]


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
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
