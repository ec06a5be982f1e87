"""How likely a model finds given answers: the loss that training lowers, row by row. No Django."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy

from chat.engine.loading import Loaded
from chat.engine.prompts import IGNORED
from tuning.ptuning.batches import MicroBatch
from tuning.ptuning.prefix import TrainingPrefixCache

LOGITS_BYTES = 256 << 20  # of one forward: with 130,000 words, logits are what takes memory

Row = tuple[list[int], list[int]]


@torch.no_grad()
def losses(
    loaded: Loaded, rows: Sequence[Row], prefix: torch.Tensor | None = None
) -> list[tuple[float, int]]:
    """(negative log-likelihood in nats, tokens) of each row's labels.

    rows: (ids, labels) as Prompter.training_ids gives them; the first label is never predicted.
    prefix: [layers, 2, kv_heads, pre_seq_len, head_dim] or None, the bare checkpoint.
    """
    pad_id = loaded.tokenizer.pad_token_id or 0
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    if prefix is not None:
        prefix = prefix.to(loaded.device, loaded.dtype)
    for numbers in _batches([len(ids) for ids, _ in rows], _tokens_at_once(loaded)):
        some = [rows[number] for number in numbers]
        batch = MicroBatch.of(some, [1.0] * len(some), pad_id, loaded.device)
        past = None if prefix is None else TrainingPrefixCache(prefix, len(some))
        logits = loaded.model(
            input_ids=batch.input_ids, past_key_values=past, use_cache=past is not None
        ).logits
        predicted = logits.flatten(0, 1)[batch.positions.to(logits.device)].float()
        each = cross_entropy(predicted, batch.targets.to(logits.device), reduction="none").cpu()
        start = 0
        for number, (_ids, labels) in zip(numbers, some, strict=True):
            count = sum(label != IGNORED for label in labels[1:])
            found[number] = float(each[start : start + count].sum()), count
            start += count
    return found


def _tokens_at_once(loaded: Loaded) -> int:
    return max(1, LOGITS_BYTES // (4 * loaded.vocabulary))


def _batches(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Rows of similar length together, at most `most_tokens` with padding (one row always)."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[number] > most_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
