"""Which columns of the cache a query sees, as additive attention masks.

A layer with a sliding window sees the last `window` columns, its own included. Columns are counted
as they lie, so a learned prefix is text like any other: layers with a window lose sight of its
first columns as the answer goes on, the others never do. That is what transformers computes with
the prefix as past_key_values, and so peft: a prefix is trained and served under one rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chat.engine.positions import PositionPlan

# A window for every layer alike, or one for each kind of layer (an entry of config.layer_types);
# None: everything is seen.
Windows = int | None | Mapping[str, int | None]
Masks = torch.Tensor | dict[str, torch.Tensor]  # as the model takes them


def windows_of(config: Any) -> Windows:
    """Of a transformers text configuration. Models whose layers differ name each layer's kind and
    take a mask per kind; the others (Mistral, Mixtral, Phi-3) have one window or none.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if window is None or (kinds and "sliding_attention" not in kinds):
        return None
    if not kinds:
        return int(window)
    return {kind: int(window) if kind == "sliding_attention" else None for kind in sorted(kinds)}


def _by_window(windows: Windows, width: int, mask: Callable[[int | None], torch.Tensor]) -> Masks:
    """A window that is not narrower than what there is hides nothing and costs nothing."""
    if not isinstance(windows, Mapping):
        return mask(windows if windows is not None and windows < width else None)
    narrow = {kind: size if size and size < width else None for kind, size in windows.items()}
    made = {size: mask(size) for size in set(narrow.values())}
    return {kind: made[size] for kind, size in narrow.items()}


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)


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
    column_index: torch.Tensor,
    width: int,
    dtype: torch.dtype,
    windows: Windows = None,
    bias: PrefixBias | None = None,
) -> Masks:
    """Additive [rows, 1, 1, width]: a row sees its columns up to and including
    column_index[row].
    """
    columns = torch.arange(width, device=column_index.device)[None]

    def mask(window: int | None) -> torch.Tensor:
        hidden = columns > column_index[:, None]
        if window is not None:
            hidden |= columns <= column_index[:, None] - window
        made = _additive(hidden, dtype)[:, None, None]
        return made if bias is None else made + bias.over(width, dtype)

    return _by_window(windows, width, mask)


def prefill_mask(
    plans: Sequence[PositionPlan],
    starts: Sequence[int],
    fresh: Sequence[int],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    windows: Windows = None,
) -> Masks:
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
    columns = torch.arange(width, device=device)[None, None]
    bias = PrefixBias.of(plans, device)

    def mask(window: int | None) -> torch.Tensor:
        hidden = columns > last_seen[..., None]
        if window is not None:
            hidden |= columns <= own[..., None] - window
        made = _additive(hidden, dtype)[:, None]
        return made if bias is None else made + bias.over(width, dtype)

    return _by_window(windows, width, mask)
