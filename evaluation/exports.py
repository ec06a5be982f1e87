"""An evaluation to take away: rows as CSV, everything as JSON, a report to print."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any

from evaluation.metrics import in_order
from evaluation.models import EvaluationRun
from portal.text import safe_cell

CSV, JSON = "predictions.csv", "run.json"
ROWS_AT_ONCE = 500


class _Echo:
    """A file for csv.writer that gives its lines back."""

    def write(self, text: str) -> str:
        return text


def csv_lines(run: EvaluationRun) -> Iterator[str]:
    """A byte order mark for Excel, the header, a line a row: texts, the base's answer where there
    is one, every score.
    """
    metrics = in_order(list(run.scores or {}))
    beside: dict[int, str] = {}
    if run.baseline_id is not None:
        beside = dict(run.baseline.predictions.values_list("row", "text"))
    writer = csv.writer(_Echo())
    header = ["row", "prompt", "reference", "prediction", *(["base"] if beside else []), *metrics]
    yield "\ufeff" + writer.writerow(header)
    for each in run.predictions.order_by("row").iterator(ROWS_AT_ONCE):
        texts = [each.prompt, each.reference, each.text]
        if beside:
            texts.append(beside.get(each.row, ""))
        scores = [each.scores.get(metric, "") for metric in metrics]
        yield writer.writerow([each.row + 1, *map(safe_cell, texts), *scores])


def as_json(run: EvaluationRun, told: dict[str, Any]) -> Iterator[str]:
    """One object: `told` (the evaluation as REST says it), its recipe, general answers and rows."""
    whole = {**told, "recipe": run.recipe, "general": run.general or None}
    yield json.dumps(whole, ensure_ascii=False, indent=2, default=str)[: -len("\n}")]
    yield ',\n  "predictions": ['
    between = "\n    "
    for each in run.predictions.order_by("row").iterator(ROWS_AT_ONCE):
        row = {
            "row": each.row,
            "prompt": each.prompt,
            "reference": each.reference,
            "prediction": each.text,
            "scores": each.scores,
        }
        yield between + json.dumps(row, ensure_ascii=False)
        between = ",\n    "
    yield "\n  ]\n}\n"
