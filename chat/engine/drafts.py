"""Guesses of an answer's next tokens, checked by the model in one forward (prompt lookup, Saxena
2023): what followed the last two or three tokens when they stood in the prompt, in the answer so
far, or in a text that the request says its answer may resemble.

A guess that the model would not have made is dropped, so greedy answers stay what they are. Without
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LONGEST, SHORTEST = 3, 2  # tokens that must agree
TOKENS = 4  # guessed at once
FEW_ROWS = 4  # up to here a forward waits for memory, and more tokens cost little
# Share of guesses that must come true for them to pay, from docs/engine.md's table of products: at
# one row, at a few, at many.
WORTH_AT_ONE, WORTH_AT_FEW, WORTH_AT_MANY = 0.12, 0.35, 0.85
# Tokens without a guess after guesses that did not pay, in small and in large batches: twice as
# many each time, until one is wholly right.
PAUSE, PAUSE_AT_MANY = 24, 96


class Drafter:
    """One answer's guesses. resembles: tokens of a text that the answer may resemble. trust: the
    share of such guesses that came true in other answers.
    """

    def __init__(self, prompt: Sequence[int], resembles: Sequence[int] = (), trust: float = 1.0):
        self._known: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where what follows these tokens stands
        self._trust, self._pause, self._failures = trust, 0, 0
        self._extend(prompt)
        self._extend(resembles)
        # an answer that begins as that text begins
        self._resembles = list(resembles)
        self._answer: list[int] = []

    def _extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            for size in range(SHORTEST, LONGEST + 1):
                if len(self._known) >= size:
                    self._after[tuple(self._known[-size:])] = len(self._known)
            self._known.append(token)

    @property
    def taken(self) -> int:
        """Tokens of the answer that it knows."""
        return len(self._answer)

    def take(self, tokens: Sequence[int]) -> None:
        """The answer's next tokens are these."""
        self._answer += tokens
        self._pause -= len(tokens)
        self._extend(tokens)

    def guess(self, rows: int, most: int) -> list[int]:
        """At most `most` tokens, none where they would not pay in a batch of `rows`."""
        worth = WORTH_AT_ONE if rows == 1 else WORTH_AT_FEW if rows <= FEW_ROWS else WORTH_AT_MANY
        count = min(TOKENS, most)
        if count < 1 or self._pause > 0 or (rows > FEW_ROWS and not self._resembles):
            return []
        if self._trust < worth:
            pause = PAUSE if rows <= FEW_ROWS else PAUSE_AT_MANY
            self._trust, self._pause = worth, pause << self._failures  # then one more attempt
            self._failures += 1
            return []
        length = len(self._answer)
        if length < len(self._resembles) and self._answer == self._resembles[:length]:
            return self._resembles[length : length + count]
        for size in range(LONGEST, SHORTEST - 1, -1):
            at = self._after.get(tuple(self._known[-size:]))
            if at is not None:
                return self._known[at : at + count]
        return []

    def came_true(self, guessed: int, right: int) -> None:
        self._trust = 0.7 * self._trust + 0.3 * right / guessed
        if right == guessed:
            self._failures = 0
