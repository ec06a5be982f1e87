"""From a bad row of an evaluation to a better dataset, through the doors of tuning/datasets."""

from __future__ import annotations

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from evaluation.models import EvaluationRun
from tuning.datasets.editing import change_rows
from tuning.datasets.store import open_split
from tuning.models import Dataset, DatasetVersion


def exclude(user, run: EvaluationRun, row: int) -> DatasetVersion:
    """A new version of the dataset without the row (0-based, of the rows that the run read). Runs
    keep the version that they have.

    The row is looked for in the newest version, so that several can be left out one after the
    other. ValidationError: not the user's dataset, no such row, or it is not there any more.
    """
    dataset = Dataset.objects.changeable_by(user).filter(pk=run.dataset_version.dataset_id).first()
    if dataset is None:
        raise ValidationError(_("Only the owner may change this."), "not_yours")
    newest = dataset.current
    gone = ValidationError(_("The newest version does not have this row any more."), "gone")
    try:
        with open_split(run.dataset_version, run.split) as rows:
            if not 0 <= row < len(rows):
                raise ValidationError(_("There is no such row."), "no_such_row")
            line = rows.raw(row)
        if newest is None or run.split not in newest.splits:
            raise gone
        with open_split(newest, run.split) as rows:
            at = next((n for n in _likely(row, len(rows)) if rows.raw(n) == line), None)
    except FileNotFoundError as missing:
        raise ValidationError(_("The dataset's files are gone."), "dataset_missing") from missing
    if at is None:
        raise gone
    return change_rows(dataset, run.split, base=newest, excluded=[at + 1])


def _likely(row: int, count: int):
    """Where the row may be by now: some before it may be gone, so backwards from there first."""
    yield from range(min(row, count - 1), -1, -1)
    yield from range(row + 1, count)
