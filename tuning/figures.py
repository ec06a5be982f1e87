"""The curves of a tuning run as figures (portal/runs/figures.py)."""

from __future__ import annotations

import math

from portal.runs.figures import Figure
from tuning.models import TuningRun

COLUMNS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "samples_per_second": "train/samples_per_second",
    "divergence": "train/divergence",
    "validation_loss": "validation/loss",
}


def figures_of(run: TuningRun) -> list[Figure]:
    """By curve, then by step; what was not measured at a step is left out."""
    rows = list(run.metrics.values("step", "created_at", *COLUMNS))
    return [
        Figure(tag, row["step"], row[column], row["created_at"].timestamp())
        for column, tag in COLUMNS.items()
        for row in rows
        if row[column] is not None and math.isfinite(row[column])
    ]
