"""How fast the engine is, measured as it goes, and what follows from it: how much prompt a step may
compute.
"""

from __future__ import annotations

import time
from collections import deque

from chat.engine.request import DEFAULT_NEW_TOKENS

PREFILL_SHARE = 1.75  # while rows decode, a step's prefill may take this many decode steps' time
SMALLEST_CHUNK = 48  # tokens
RATE_WINDOW = 10.0  # seconds over which tokens/s is reported


class TokenBudget:
    """Belongs to the engine's thread; `rate` may be asked on any."""

    def __init__(self, prefill_tokens: int):
        self._most = prefill_tokens
        self._prefill_cost: float | None = None  # seconds a prompt token: a running mean
        self._decode_cost: float | None = None  # seconds a decode step
        self._produced: deque[tuple[float, int]] = deque()

    def prefilled(self, tokens: int, seconds: float) -> None:
        self._prefill_cost = _mean(self._prefill_cost, seconds / tokens)

    def decoded(self, seconds: float) -> None:
        self._decode_cost = _mean(self._decode_cost, seconds)

    def shared(self, tokens: int, seconds: float) -> None:
        """A forward of `tokens` prompt tokens that decoded one of every row as well."""
        self.prefilled(tokens, max(seconds - (self._decode_cost or 0.0), 0.1 * seconds))

    def produced(self, tokens: int) -> None:
        """Answer tokens that have just been handed out."""
        now = time.monotonic()
        self._produced.append((now, tokens))
        while self._produced[0][0] < now - RATE_WINDOW:
            self._produced.popleft()

    def prefill_budget(self, waiting: int, decoding: int) -> int:
        """Prompt tokens of the next step.

        While rows decode, so few that no stream stalls: inter-token times stay below about three
        times the usual. Unless half as many people wait as are being answered: in a burst the first
        token matters more, and a batch that fills slowly is slow for all.
        """
        if 2 * waiting > decoding or not self._prefill_cost or not self._decode_cost:
            return self._most
        affordable = int(PREFILL_SHARE * self._decode_cost / self._prefill_cost)
        return max(SMALLEST_CHUNK, min(self._most, affordable))

    def rate(self) -> float:
        """Answer tokens per second, of late; 0 when there were none."""
        produced = list(self._produced)
        if len(produced) < 2:
            return 0.0
        elapsed = time.monotonic() - produced[0][0]
        return (
            sum(count for _, count in produced) / elapsed if 0 < elapsed < 2 * RATE_WINDOW else 0.0
        )

    def retry_after(self) -> int:
        """Seconds until a place in line should be free: a guess from the present speed, 1 to 60."""
        rate = self.rate()
        return max(1, min(60, round(DEFAULT_NEW_TOKENS / rate))) if rate else 5


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else 0.8 * mean + 0.2 * value
