"""Choosing the next token of every row at once, each by its own parameters.

Order as in transformers' generate: repetition penalty, temperature, top_k, top_p; OpenAI's
frequency and presence penalty and logit_bias stand before the temperature. A row's draws
come from its own random stream, one number a token, so that its answer does not depend on what else
is in the batch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from chat.engine.request import SamplingParams

if TYPE_CHECKING:
    from chat.engine.grammars import Grammar


@dataclass
class SamplerState:
    """A row's sampling state. seen: the tokens of prompt and answer so far; counts: how often each
    has occurred in the answer; grammar: what the answer must be, None: anything.
    """

    sampling: SamplingParams
    draws: random.Random
    seen: set[int] = field(default_factory=set)
    counts: Counter[int] = field(default_factory=Counter)
    grammar: Grammar | None = None

    @classmethod
    def of(cls, sampling: SamplingParams, prompt: Sequence[int]) -> SamplerState:
        return cls(sampling, random.Random(sampling.seed), set(prompt))

    def take(self, token: int) -> None:
        """The answer's next token has been chosen."""
        self.seen.add(token)
        self.counts[token] += 1
        if self.grammar is not None:
            self.grammar.take(token)

    @property
    def plain(self) -> bool:
        """Is its next token the one with the highest score, and nothing else asked for?"""
        wishes = self.sampling
        return (
            self.greedy
            and self.grammar is None
            and wishes.logprobs is None
            and wishes.repetition_penalty == 1.0
            and not (wishes.presence_penalty or wishes.frequency_penalty or wishes.logit_bias)
        )

    @property
    def greedy(self) -> bool:
        return (
            not self.sampling.do_sample
            or self.sampling.temperature == 0
            or self.sampling.top_k == 1
        )


@dataclass(frozen=True)
class SampledToken:
    """A row's next token; logprobs as (token id, natural logarithm of the model's probability), the
    token itself first.

    token is None where the row's logits are not finite: the request cannot go on.
    """

    token: int | None
    logprobs: list[tuple[int, float]] | None = None


def sample(logits: torch.Tensor, rows: Sequence[SamplerState]) -> list[SampledToken]:
    """logits: [rows, vocabulary] of any float dtype; changed in place where a penalty, a bias or a
    grammar applies. ValueError, before anything is drawn, when a grammar gives up.
    """
    allowed = [None if row.grammar is None else row.grammar.allowed() for row in rows]
    reported = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    raw = logits[reported].float() if reported else None
    for i, row in enumerate(rows):
        _adjust(logits[i], row)
        if (mask := allowed[i]) is not None:
            logits[i].masked_fill_(~mask.to(logits.device), -torch.inf)
    best, tokens = logits.max(dim=-1)
    sampled = [i for i, row in enumerate(rows) if not row.greedy]
    if sampled:
        everyone = len(sampled) == len(rows)
        drawn = _draw(logits if everyone else logits[sampled], [rows[i] for i in sampled])
        tokens = (
            drawn
            if everyone
            else tokens.index_copy(0, torch.tensor(sampled, device=logits.device), drawn)
        )
    finite = torch.isfinite(best).tolist()
    ids = tokens.tolist()
    reports = _report(
        raw, [ids[i] for i in reported], [rows[i].sampling.logprobs for i in reported]
    )
    by_row = dict(zip(reported, reports, strict=True))
    return [
        SampledToken(token if good else None, by_row.get(i))
        for i, (token, good) in enumerate(zip(ids, finite, strict=True))
    ]


def _adjust(scores: torch.Tensor, row: SamplerState) -> None:
    """scores: [vocabulary]. Repetition penalty (Keskar et al. 2019, CTRL): seen tokens' scores are
    divided where positive, multiplied where negative. Then, as OpenAI documents them,
    score - count * frequency_penalty - (count > 0) * presence_penalty + bias.
    """
    sampling, device = row.sampling, scores.device
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(row.seen), dtype=torch.long, device=device)
        values, penalty = scores[seen], sampling.repetition_penalty
        scores[seen] = torch.where(values < 0, values * penalty, values / penalty)
    changes: dict[int, float] = dict(sampling.logit_bias)
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, count in row.counts.items():
            penalty = count * sampling.frequency_penalty + sampling.presence_penalty
            changes[token] = changes.get(token, 0.0) - penalty
    if changes:
        tokens = torch.tensor(list(changes), dtype=torch.long, device=device)
        added = torch.tensor(list(changes.values()), dtype=torch.float32, device=device)
        scores[tokens] = (scores[tokens].float() + added).to(scores.dtype)


def _draw(logits: torch.Tensor, rows: Sequence[SamplerState]) -> torch.Tensor:
    device, vocabulary = logits.device, logits.shape[1]
    top_k = [
        row.sampling.top_k if 0 < row.sampling.top_k < vocabulary else vocabulary for row in rows
    ]
    widest = max(top_k)
    # [rows, 3]: temperature, top_p, the draw; one copy to the device
    numbers = torch.tensor(
        [[row.sampling.temperature, row.sampling.top_p, row.draws.random()] for row in rows],
        dtype=torch.float64,
    ).to(device)
    scores, order = (
        logits.float().topk(widest, dim=-1)
        if widest < vocabulary
        else logits.float().sort(-1, descending=True)
    )
    scores = scores / numbers[:, :1].float()
    if min(top_k) < widest:
        beyond = (
            torch.arange(widest, device=device)[None] >= torch.tensor(top_k, device=device)[:, None]
        )
        scores = scores.masked_fill(beyond, -torch.inf)
    probabilities = scores.softmax(-1, dtype=torch.float64)
    running = probabilities.cumsum(-1)
    kept = (running - probabilities) < numbers[:, 1:2]  # the first token always: 0 < top_p
    running = torch.where(kept, running, 0.0)
    total = running.amax(-1, keepdim=True)
    # the first token whose running sum exceeds the draw; tokens beyond the kept ones count as never
    # exceeding
    index = ((running <= numbers[:, 2:] * total) & kept).sum(-1, keepdim=True)
    index = index.minimum(kept.sum(-1, keepdim=True) - 1).clamp_min(0)
    return order.gather(-1, index)[:, 0]


def _report(
    logits: torch.Tensor | None, tokens: Sequence[int], counts: Sequence[int | None]
) -> list[list[tuple[int, float]]]:
    if logits is None:
        return []
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, indices = logprobs.topk(max([1, *[count or 0 for count in counts]]), dim=-1)
    top_values, top_indices = values.tolist(), indices.tolist()
    return [
        [(token, own[i]), *list(zip(top_indices[i], top_values[i], strict=True))[: count or 0]]
        for i, (token, count) in enumerate(zip(tokens, counts, strict=True))
    ]
