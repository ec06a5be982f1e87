"""Attention of a decode step on a CPU: rows of similar length together.

A batch's keys are one rectangle as wide as its longest row, and SDPA computes, and masks, all of
it. So one long conversation would make every other row's step as long as its own. Here neighbouring
rows whose lengths are alike go into a call of their own. On a GPU a decode step is one captured
graph of fixed shapes (cuda_graphs.py) and this is not used.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from chat.engine.loading import Loaded

NAME = "rows_of_similar_length"
CALL_BYTES = 100_000  # a call costs as much time as reading so many bytes of keys and values

Group = tuple[int, int, int]  # first row, row behind the last, width in columns
_now = threading.local()  # .groups: of the decode step that runs on this thread


def groups_of(widths: Sequence[int], call_cost: int) -> list[Group]:
    """Neighbouring rows shared out so that the columns computed, plus `call_cost` columns a group,
    are as few as possible.
    """
    count = len(widths)
    # of the first n rows: cost, and where the last group begins
    least, cut = [0] * (count + 1), [0] * (count + 1)
    for end in range(1, count + 1):
        width, best = 0, -1
        for start in range(end - 1, -1, -1):
            width = max(width, widths[start])
            cost = least[start] + width * (end - start) + call_cost
            if best < 0 or cost < best:
                best, cut[end] = cost, start
        least[end] = best
    groups, end = [], count
    while end:
        groups.append((cut[end], end, max(widths[cut[end] : end])))
        end = cut[end]
    return groups[::-1]


def _grouped(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' SDPA: query [rows, heads, 1, head_dim] to [rows, 1, heads, head_dim]."""
    parts = [
        sdpa_attention_forward(
            module,
            query[start:end],
            key[start:end, :, :width],
            value[start:end, :, :width],
            attention_mask[start:end, ..., :width],
            **options,
        )[0]
        for start, end, width in _now.groups
    ]
    return torch.cat(parts), None


AttentionInterface.register(NAME, _grouped)


@contextlib.contextmanager
def rows_of_similar_length(loaded: Loaded, widths: Sequence[int]) -> Iterator[None]:
    """For one decode step: widths[i] columns of row i are seen, from the first on. Changes nothing
    where it would not pay.
    """
    config = loaded.model.config.get_text_config()
    call_cost = CALL_BYTES // (2 * loaded.kv_heads * loaded.head_dim * loaded.dtype.itemsize)
    wasted = max(widths) * len(widths) - sum(widths)
    if loaded.device.type != "cpu" or config._attn_implementation != "sdpa" or wasted <= call_cost:
        yield
        return
    _now.groups = groups_of(widths, call_cost)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
