"""Examples as the trainer reads them: tokens and labels of a row, and what becomes of rows that
are longer than the recipe's lengths. No torch: pages show the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from chat.engine.prompts import Prompter
from tuning.datasets.examples import messages_of
from tuning.ptuning.recipe import OVERLONG

TRUNCATE, DROP, REFUSE = OVERLONG
_AT_ONCE = 1000  # rows


class TooLong(Exception):
    """Rows are longer than the recipe's lengths, and the recipe says to refuse such."""

    code = "rows_too_long"

    def __init__(self, rows: int, count: int):
        super().__init__(f"{rows} of {count} examples are longer than the recipe's lengths")
        self.rows, self.count = rows, count


def lengths_of(examples: Sequence[dict[str, Any]], prompter: Prompter) -> Iterator[tuple[int, int]]:
    """(tokens of the prompt, of the response) of each example, uncut."""
    for start in range(0, len(examples), _AT_ONCE):
        rows = [examples[row] for row in range(start, min(start + _AT_ONCE, len(examples)))]
        yield from prompter.training_lengths(
            [
                (messages_of(row["prompt"], row.get("history") or ()), row["response"])
                for row in rows
            ]
        )


class Encoded:
    """Examples as token lists, encoded when they are read. Rows with a blank prompt or response are
    left out, as upstream does; with `overlong` "drop" also those that the lengths would cut, which
    "refuse" answers with TooLong.
    """

    def __init__(
        self,
        examples: Sequence[dict[str, Any]],
        prompter: Prompter,
        max_source_length: int,
        max_target_length: int,
        overlong: str = TRUNCATE,
    ):
        self._examples, self._prompter = examples, prompter
        self._lengths = max_source_length, max_target_length
        self._rows = []
        for index in range(len(examples)):
            example = examples[index]
            if example["prompt"].strip() and example["response"].strip():
                self._rows.append(index)
        self.dropped = 0
        if overlong != TRUNCATE:
            self._leave_out_long(overlong)

    def _leave_out_long(self, overlong: str) -> None:
        count = len(self._rows)
        lengths = lengths_of(self._kept(), self._prompter)
        fitting = [
            row
            for row, (prompt, response) in zip(self._rows, lengths, strict=True)
            if prompt <= self._lengths[0] and response <= self._lengths[1]
        ]
        self.dropped = count - len(fitting)
        if self.dropped and overlong == REFUSE:
            raise TooLong(self.dropped, count)
        self._rows = fitting

    def _kept(self) -> Sequence[dict[str, Any]]:
        return _Picked(self._examples, self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        """(input_ids, labels), equally long, not padded."""
        example = self._examples[self._rows[index]]
        return self._prompter.training_ids(
            messages_of(example["prompt"], example.get("history") or ()),
            example["response"],
            *self._lengths,
        )


class _Picked(Sequence[dict[str, Any]]):
    """Some rows of a sequence, read when they are asked for."""

    def __init__(self, rows: Sequence[dict[str, Any]], numbers: Sequence[int]):
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[self._numbers[index]]
