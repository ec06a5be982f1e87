"""The two forwards of a step by the flat forward (flat_forward.py): in place of prefill.Prefiller
and cuda_graphs.EagerDecoder, with their signatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Several

import torch

from chat.engine.flat_forward import FlatForward
from chat.engine.kv_cache import KVCache
from chat.engine.positions import Positions
from chat.engine.sequence import Sequence


class FlatSteps:
    """Belongs to one engine's cache."""

    slack = math.inf  # nothing is padded: all prompts of a step share a forward

    def __init__(self, flat: FlatForward, cache: KVCache, positions: Positions):
        self._flat, self._cache, self._positions = flat, cache, positions

    def prefill(self, rows: Several[Sequence], counts: Several[int]) -> torch.Tensor:
        """Feed rows[i] its next counts[i] prompt tokens, or its last token where that is 0 (it is
        past its prompt); logits [rows, vocabulary] of the last one of each.
        """
        return self._run(
            rows,
            [
                row.prompt[row.num_computed_tokens : row.num_computed_tokens + count]
                if count
                else row.output_ids[-1:]
                for row, count in zip(rows, counts, strict=True)
            ],
        )

    def decode(self, rows: Several[Sequence]) -> torch.Tensor:
        """Feed each row its last token; logits [rows, vocabulary]."""
        return self._run(rows, [row.output_ids[-1:] for row in rows])

    def check(self, rows: Several[Sequence], guesses: Several[list[int]]) -> torch.Tensor:
        """Feed each row its last token and the guesses behind it; logits [tokens, vocabulary] of
        all of them, row by row. The cache holds them all then: the row's length decides.
        """
        tokens = [[row.output_ids[-1], *guess] for row, guess in zip(rows, guesses, strict=True)]
        return self._run(rows, tokens, [len(each) for each in tokens])

    def _run(
        self,
        rows: Several[Sequence],
        tokens: Several[list[int]],
        wanted: Several[int] | None = None,
    ) -> torch.Tensor:
        """tokens[i] follow what rows[i] has in the cache; logits of the last wanted[i] (one) of
        each, row by row.
        """
        wanted = wanted or [1] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: id(rows[i].shared_prefix))
        ids, positions, slots, columns = [], [], [], []  # type: ignore[var-annotated]
        prefixes, biases, ends = [], [], [0] * len(rows)
        for i in order:
            row, count = rows[i], len(tokens[i])
            ids += tokens[i]
            positions += self._positions.prefill(row.positions, row.kv_length, count)
            slots += [row.slot] * count
            columns += range(row.kv_length, row.kv_length + count)
            prefixes += [row.shared_prefix] * count
            biases += [row.positions.prefix_bias] * count
            ends[i] = len(ids)
        kept = [range(end - count, end) for end, count in zip(ends, wanted, strict=True)]
        last = [at for each in kept for at in each]
        return self._flat.run(self._cache, ids, positions, slots, columns, prefixes, last, biases)
