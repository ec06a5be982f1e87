"""From encoded examples to padded micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from chat.engine.prompts import IGNORED


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def rows_of_step(step: int, samples: int, count: int, seed: int) -> list[int]:
    """Which of `count` examples update `step` (0 is the first) reads: epochs in a fresh order each,
    joined without a gap.

    Depends on its arguments alone, so a resumed run reads what an uninterrupted one would have
    read.
    """
    position = step * samples
    return [
        _shuffled(count, seed, at // count)[at % count]
        for at in range(position, position + samples)
    ]


def front_of_step(step: int, count: int, share: float, seed: int) -> int | None:
    """Which of `count` other prefixes stands in front in update `step`; None in all but `share` of
    the steps. Depends on its arguments alone, as rows_of_step.
    """
    if not count:
        return None
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step * 7919 + 1)
    drawn = torch.rand(2, generator=generator).tolist()
    return int(drawn[1] * count) if drawn[0] < share else None


def token_weights(labels: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """Weight of each label token of each example, so that the weighted sum over a step is
    the original's loss.

    That is the mean over the tokens of each batch of `batch_size` consecutive examples, then over
    these batches. The first label of an example is never predicted (labels are shifted by one).
    """
    counts = [sum(label != IGNORED for label in row[1:]) for row in labels]
    batches = [
        range(start, min(start + batch_size, len(counts)))
        for start in range(0, len(counts), batch_size)
    ]
    weights = [0.0] * len(counts)
    for batch in batches:
        tokens = sum(counts[row] for row in batch)
        for row in batch:
            weights[row] = 1.0 / (tokens * len(batches)) if tokens else 0.0
    return weights


def group_by_length(lengths: Sequence[int], max_tokens: int, overhead: int) -> list[list[int]]:
    """Splits a step's examples into micro-batches of similar length; returns the row numbers of
    each.

    Minimises padded tokens + `overhead` tokens per micro-batch (what one more forward and backward
    costs), while no micro-batch of more than one example exceeds `max_tokens` padded tokens. Exact,
    by dynamic programming.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    # best[n]: cost of the n longest; start_of[n]: where their last micro-batch begins
    best, start_of = [0.0], [0]
    for end in range(1, len(order) + 1):
        found: list[tuple[float, int]] = []
        for start in range(end - 1, -1, -1):
            tokens = (end - start) * lengths[order[start]]
            if tokens > max_tokens and found:
                break  # a micro-batch that begins earlier is larger still
            found.append((best[start] + overhead + tokens, start))
        cost, start = min(found)
        best.append(cost)
        start_of.append(start)
    groups, end = [], len(order)
    while end:
        groups.append(order[start_of[end] : end])
        end = start_of[end]
    return groups[::-1]


@dataclass
class MicroBatch:
    """input_ids [rows, longest], right padded; `positions` [n] index its flattened [rows * longest]
    hidden states that predict `targets` [n], each counted with `weights` [n].

    top_ids, top_logprobs [n, k]: given for rows whose answers the base wrote itself; then not the
    targets but the base's distribution is what the prediction is held to.
    behind [rows]: which of several prefixes each row stands behind; None: all behind the same.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    behind: torch.Tensor | None = None

    @property
    def owners(self) -> torch.Tensor | None:
        """[n]: which of several prefixes each prediction stands behind."""
        if self.behind is None:
            return None
        return self.behind[self.positions // self.input_ids.shape[1]]

    @classmethod
    def of(
        cls,
        rows: Sequence[tuple[list[int], list[int]]],
        weights: Sequence[float],
        pad_id: int,
        device: torch.device,
        top: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> MicroBatch:
        """rows: (ids, labels) each. top: (top_ids, top_logprobs) of each row's predicted labels."""
        longest = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), longest), pad_id)
        labels = torch.full((len(rows), longest), IGNORED)
        for number, (ids, row_labels) in enumerate(rows):
            input_ids[number, : len(ids)] = torch.tensor(ids)
            labels[number, : len(ids)] = torch.tensor(row_labels)
        labels = labels.roll(-1, dims=1)  # position t predicts token t + 1
        labels[:, -1] = IGNORED
        positions = (labels.flatten() != IGNORED).nonzero().squeeze(1)
        per_token = torch.tensor(weights, dtype=torch.float32)[positions // longest]
        parts = [input_ids, positions, labels.flatten()[positions], per_token]
        if top is not None:
            parts += [torch.cat([ids for ids, _ in top]), torch.cat([probs for _, probs in top])]
        return cls(*(part.to(device, non_blocking=True) for part in parts))
