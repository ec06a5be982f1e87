"""What a way to tune has come to, kept so that a long benchmark goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """Scores in percent, losses in nats per token; None: not measured here.

    kept: share of small talk still answered exactly (starter). general_loss: on sentences that have
    nothing to do with the task. cpu_seconds: of the training alone, what prepares it included.
    """

    rouge_l: float | None = None
    bleu_4: float | None = None
    dev_loss: float | None = None
    kept: float | None = None
    general_loss: float | None = None
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0


class Kept:
    """Outcomes by what they were measured with, one small file each."""

    def __init__(self, folder: Path | None):
        self._folder = folder

    def of(self, what: dict[str, Any], measure: Callable[[], Outcome]) -> Outcome:
        """The outcome kept for `what`, or that of `measure()`, which is kept."""
        if self._folder is None:
            return measure()
        asked = json.dumps(what, sort_keys=True, default=str)
        path = self._folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.json"
        if path.exists():
            return Outcome(**json.loads(path.read_text())["outcome"])
        outcome = measure()
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"what": what, "outcome": asdict(outcome)}, default=str) + "\n")
        return outcome


def table(title: str, outcomes: dict[str, Outcome]) -> None:
    """Prints one line per outcome; columns that nobody measured stay out."""
    columns = {
        "rouge_l": "ROUGE-L",
        "bleu_4": "BLEU-4",
        "dev_loss": "dev loss",
        "general_loss": "general",
        "kept": "kept %",
        "cpu_seconds": "CPU-s",
        "wall_seconds": "wall s",
    }
    shown = {
        name: head
        for name, head in columns.items()
        if any(getattr(outcome, name) is not None for outcome in outcomes.values())
    }
    print(f"{title:28}" + "".join(f"{head:>10}" for head in shown.values()))
    for name, outcome in outcomes.items():
        cells = (getattr(outcome, column) for column in shown)
        print(
            f"{name:28}"
            + "".join(f"{'':>10}" if cell is None else f"{cell:>10.3f}" for cell in cells)
        )
