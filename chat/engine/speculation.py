"""A decode step that checks guesses (drafts.py): a row gains as many tokens as its guess is right
about, and the one that the model says comes then.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from itertools import accumulate

import torch

from chat.engine.drafts import FEW_ROWS, Drafter
from chat.engine.flat_steps import FlatSteps
from chat.engine.prompts import Prompter
from chat.engine.sampler import SampledToken, sample
from chat.engine.sequence import Sequence

TRUST_OVER = 20  # guesses


class Speculation:
    """Belongs to the engine's thread."""

    def __init__(self, steps: FlatSteps, prompter: Prompter):
        self._steps, self._prompter = steps, prompter
        # share of guesses that came true lately, of answers without and with a text they resemble
        self._trust = {False: 1.0, True: 1.0}

    def decode(self, rows: Several[Sequence]) -> list[tuple[Sequence, SampledToken]] | None:
        """The rows' next tokens, in order; their lengths count those that are kept. None, and
        nothing done, where no row has a guess.
        """
        guesses = [self._guess(row, len(rows)) for row in rows]
        return self._checked(rows, guesses) if any(guesses) else None

    def _guess(self, row: Sequence, rows: int) -> list[int]:
        if not row.sampler_state.plain or (rows > FEW_ROWS and not row.request.resembles):
            return []
        if row.drafter is None:
            resembles = row.request.resembles
            # without the token that ends an answer
            known = self._prompter.response_ids(resembles)[:-1] if resembles else []
            row.drafter = Drafter(row.prompt, known, self._trust[bool(resembles)])
        drafter = row.drafter
        drafter.take(row.output_ids[drafter.taken :])
        return drafter.guess(rows, row.new_tokens_limit - len(row.output_ids) - 1)

    def _checked(
        self, rows: Several[Sequence], guesses: Several[list[int]]
    ) -> list[tuple[Sequence, SampledToken]]:
        logits = self._steps.check(rows, guesses)
        ends = list(accumulate(1 + len(guess) for guess in guesses))
        first = [end - 1 - len(guess) for end, guess in zip(ends, guesses, strict=True)]
        plain = [i for i, guess in enumerate(guesses) if not guess]
        drawn: list[SampledToken] = []
        if plain:
            states = [rows[i].sampler_state for i in plain]
            drawn = sample(logits[[first[i] for i in plain]], states)
        by_row = dict(zip(plain, drawn, strict=True))
        best, tokens = logits.max(dim=-1)
        ids, finite = tokens.tolist(), torch.isfinite(best).tolist()
        sampled: list[tuple[Sequence, SampledToken]] = []
        for i, (row, guess, start) in enumerate(zip(rows, guesses, first, strict=True)):
            own = ids[start : start + len(guess)]
            right = next((n for n, token in enumerate(guess) if token != own[n]), len(guess))
            row.kv_length += right + 1
            if not guess:
                sampled.append((row, by_row[i]))
                continue
            assert row.drafter is not None
            row.drafter.came_true(len(guess), right)
            kind = bool(row.request.resembles)
            self._trust[kind] += (right / len(guess) - self._trust[kind]) / TRUST_OVER
            sampled += [
                (row, SampledToken(ids[at] if finite[at] else None))
                for at in range(start, start + right + 1)
            ]
        return sampled
