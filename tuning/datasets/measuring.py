"""A split measured with a checkpoint's tokenizer: lengths in tokens, near duplicates, and single
rows as the trainer sees them. All cores, no torch, no database.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from chat.checkpoints.describe import CheckpointInvalid
from chat.engine.prompts import IGNORED
from chat.prompters import prompter_of
from tuning.datasets import lint
from tuning.datasets.files import Split
from tuning.ptuning.encoded import Encoded, lengths_of

_BLOCK = 2000  # rows of one piece of work
MOST_TOLD = 1000  # pairs of near duplicates, and longest rows, that are named
PARTS = ("prompt", "response")
Lengths = list[tuple[int, int]]


def _measured(folder: str, sha256: str, start: int) -> tuple[list[bytes], Lengths]:
    """(sketches, lengths) of the rows from `start` on: uncut, with all that the template and the
    end of the answer add.
    """
    with Split(sha256) as split:
        rows = [split[row] for row in range(start, min(start + _BLOCK, len(split)))]
    sketches = lint.sketches([f"{row['prompt']}\n{row['response']}" for row in rows])
    return sketches, list(lengths_of(rows, prompter_of(folder)))


def _as_a_child() -> None:
    """Signals end the process, which ends with its parent."""
    from portal.runs.children import end_with_parent  # with Django's models, which a row needs not

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(signal.SIGKILL)


def measure(
    folder: str, sha256: str, rows: int, report: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """{"rows", "near_duplicates": {"count", "pairs": [[line, earlier line], ...]}, "prompt" and
    "response": {"lengths": [[tokens, rows], ...], "longest": [[line, tokens], ...]}}; lines from 1.

    `report` is told after each piece how many rows are done; what it raises ends the work. Raises
    CheckpointInvalid, FileNotFoundError.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one of the cores
    prompter_of(folder)
    sketches: list[bytes] = []
    lengths: Lengths = []
    # fork: the tokenizer is loaded, and not a second time in each process
    pool = ProcessPoolExecutor(
        os.cpu_count(), multiprocessing.get_context("fork"), initializer=_as_a_child
    )
    try:
        work = [pool.submit(_measured, folder, sha256, start) for start in range(0, rows, _BLOCK)]
        for piece in work:
            found, measured = piece.result()
            sketches += found
            lengths += measured
            report(len(lengths))
    finally:
        pool.shutdown(cancel_futures=True)
    twins = lint.near_duplicates(sketches)
    told: dict[str, Any] = {
        "rows": rows,
        "near_duplicates": {
            "count": len(twins),
            "pairs": [[row + 1, first + 1] for row, first in twins[:MOST_TOLD]],
        },
    }
    for column, part in enumerate(PARTS):
        longest = sorted(
            ((pair[column], -line) for line, pair in enumerate(lengths, 1)), reverse=True
        )
        told[part] = {
            "lengths": sorted(map(list, Counter(pair[column] for pair in lengths).items())),
            "longest": [[-line, tokens] for tokens, line in longest[:MOST_TOLD]],
        }
    return told


def longer(report: dict[str, Any], part: str, limit: int) -> int:
    """How many rows of a report have a longer prompt or response."""
    return sum(rows for tokens, rows in report[part]["lengths"] if tokens > limit)


def bars(report: dict[str, Any], part: str) -> Iterator[tuple[int, int, int]]:
    """(lowest, highest, rows) of each bar of a histogram of the lengths."""
    return lint.histogram(Counter(dict(report[part]["lengths"])))


def row_as_trained(
    folder: str, sha256: str, line: int, max_source_length: int, max_target_length: int
) -> list[dict[str, Any]]:
    """Every token of a row, in the trainer's own encoding: [{"id", "text", "trained"}], `trained`
    where the loss counts it. Raises IndexError, CheckpointInvalid, FileNotFoundError.
    """
    prompter = prompter_of(folder)
    with Split(sha256) as split:
        example = split[line - 1]
    ids, labels = Encoded([example], prompter, max_source_length, max_target_length)[0]
    return [
        {"id": token, "text": prompter.token_text(token), "trained": label != IGNORED}
        for token, label in zip(ids, labels, strict=True)
    ]


def task_tokens(folder: str, text: str) -> int:
    """How many tokens of a prefix a task's text takes that it begins with. Raises
    CheckpointInvalid.
    """
    return len(prompter_of(folder).context_ids(text, ()))


QUESTIONS: dict[str, Callable[..., Any]] = {
    "row_as_trained": row_as_trained,
    "task_tokens": task_tokens,
}


def main() -> None:
    """`python -m tuning.datasets.measuring`: one answer for a page, whose process has no
    tokenizers. [one of QUESTIONS, its arguments ...] as JSON in, {"answer"} or {"error"} out.
    """
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")  # for the data's folder
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    found: dict[str, Any]
    try:
        question, *arguments = json.load(sys.stdin)
        found = {"answer": QUESTIONS[question](*arguments)}
    except (CheckpointInvalid, FileNotFoundError) as fault:
        found = {"error": str(fault)}
    print(json.dumps(found), file=answer, flush=True)


if __name__ == "__main__":
    main()
