"""Prompt tokens of several rows in one forward. The decode step is in cuda_graphs.py."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import Any

import torch

from chat.engine.kv_cache import KVCache
from chat.engine.loading import Loaded
from chat.engine.masks import prefill_mask
from chat.engine.positions import Positions
from chat.engine.sequence import Sequence

# padded / real tokens that a batched prefill may cost on a CPU; a GPU is idle on small forwards
PADDING_WASTE = 1.15
PADDING_WASTE_ON_GPU = 4.0


class Prefiller:
    """Rows that are neighbours in the cache, each with its next prompt tokens, right aligned in a
    rectangle.
    """

    def __init__(self, loaded: Loaded, cache: KVCache, positions: Positions):
        self._loaded, self._cache, self._positions = loaded, cache, positions
        self.slack = PADDING_WASTE if loaded.device.type == "cpu" else PADDING_WASTE_ON_GPU

    def prefill(self, rows: Several[Sequence], counts: Several[int]) -> torch.Tensor:
        """Feed rows[i] its next counts[i] prompt tokens; logits [rows, vocabulary] of the last one
        of each.
        """
        queries, device = max(counts), self._loaded.device
        ids: list[int] = []
        positions: list[Any] = []
        for row, count in zip(rows, counts, strict=True):
            pad = queries - count
            ids += [0] * pad + row.prompt[row.num_computed_tokens : row.num_computed_tokens + count]
            positions += [self._positions.padding] * pad + self._positions.prefill(
                row.positions, row.num_computed_tokens, count
            )
        plans, starts = [row.positions for row in rows], [row.kv_length for row in rows]
        width = self._cache.set_prefill_target(rows[0].slot, starts, counts)
        output = self._loaded.model(
            input_ids=torch.tensor(ids, device=device).view(len(rows), queries),
            position_ids=self._positions.shape(torch.tensor(positions, device=device), len(rows)),
            attention_mask=prefill_mask(
                plans, starts, counts, width, self._loaded.dtype, device, self._loaded.windows
            ),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def groups(counts: Several[int], slack: float) -> list[int]:
    """Borders of neighbouring rows that share a padded forward: padded tokens stay below `slack`
    times the real ones.
    """
    borders, real = [0], 0
    for i, count in enumerate(counts):
        start = borders[-1]
        real += count
        widest = max(counts[start : i + 1])
        if i > start and widest * (i + 1 - start) > slack * real:
            borders.append(i)
            real = count
    return [*borders, len(counts)]
