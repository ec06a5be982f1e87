"""What a run measured, for tools that keep and plot figures of many runs: TensorBoard's event files
to take away, and an MLflow server where one is configured (mlflow.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from django.http import HttpResponse

from portal.models import Run


@dataclass(frozen=True)
class Figure:
    """One point of a curve. at: seconds since 1970."""

    tag: str
    step: int
    value: float
    at: float


def event_file(figures: Iterable[Figure]) -> bytes:
    """A TensorBoard event file: scalars, in the order given."""
    from tensorboardX import SummaryWriter  # imports protobuf, which nothing else needs

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for figure in figures:
                writer.add_scalar(figure.tag, figure.value, figure.step, walltime=figure.at)
        (path,) = Path(folder).iterdir()
        return path.read_bytes()


def event_file_response(run: Run, figures: Iterable[Figure]) -> HttpResponse:
    """The download. TensorBoard reads what has "tfevents" in its name."""
    begun = int((run.started_at or run.created_at).timestamp())
    name = f"events.out.tfevents.{begun}.{run.kind}-{run.pk}"
    response = HttpResponse(event_file(figures), content_type="application/octet-stream")
    response["Content-Disposition"] = f'attachment; filename="{name}"'
    return response
