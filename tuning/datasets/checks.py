"""Checks of a dataset with a checkpoint's tokenizer: started, found again, and asked how many rows
the lengths of a run would cut. The work itself is in measuring.py.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils.translation import gettext as _

from chat.models import Checkpoint
from portal.models import Run
from portal.runs import lifecycle
from tuning.datasets import measuring
from tuning.datasets.store import TRAIN
from tuning.models import CheckRun, Dataset, DatasetVersion

logger = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parents[2]
_PATIENCE = 60.0  # seconds for a row; the first one of a checkpoint reads its tokenizer
_rows_at_once = threading.BoundedSemaphore(2)


def create_check(
    owner, *, dataset: Dataset, checkpoint: Checkpoint, split: str = TRAIN, in_queue: bool = True
) -> tuple[CheckRun, bool]:
    """The run that measures a split of the newest version, and whether it is a new one: who asks
    for what is being counted, or was counted, gets that. ValidationError({field: ...}).
    """
    version = dataset.current
    problems = {}
    if version is None or split not in version.splits:
        problems["dataset"] = ValidationError(_("The dataset has no rows."), "no_rows")
    if not checkpoint.path:
        message = _("“%(name)s” is served by another server; its tokenizer is not here.")
        problems["checkpoint"] = ValidationError(message % {"name": checkpoint.name}, "no_weights")
    if problems:
        raise ValidationError(problems)
    with transaction.atomic():
        found = CheckRun.objects.filter(
            owner=owner,
            status__in=(*Run.ACTIVE, Run.Status.SUCCEEDED),
            **_same(version, checkpoint),
        )
        for run in found:
            if run.recipe["dataset"]["split"] == split:
                return run, False
        from tuning.plan import frozen_inputs  # which asks for reports here

        run = CheckRun(
            owner=owner,
            kind=Run.Kind.CHECK,
            name=f"{dataset.name}"[:120],
            dataset_version=version,
            checkpoint=checkpoint,
            total=version.splits[split]["rows"],
            recipe=frozen_inputs(version, split, checkpoint),
        )
        lifecycle.enqueue(run, ring_bell=in_queue)
    return run, True


def _same(version: DatasetVersion, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "dataset_version": version,
        "checkpoint": checkpoint,
        "recipe__checkpoint__fingerprint": checkpoint.fingerprint,
    }


def report_of(
    version: DatasetVersion, checkpoint: Checkpoint, split: str = TRAIN
) -> dict[str, Any] | None:
    """What the newest finished check of these rows with this tokenizer found, whoever asked."""
    found = CheckRun.objects.filter(status=Run.Status.SUCCEEDED, **_same(version, checkpoint))
    return next((run.report for run in found if run.recipe["dataset"]["split"] == split), None)


def told_of_cuts(report: dict[str, Any], source: int, target: int) -> list[str]:
    """What lengths of a run cut, in words; nothing where every row fits."""
    told = []
    rows = report["rows"]
    if cut := measuring.longer(report, "prompt", source):
        told.append(
            _("%(cut)s of %(rows)s prompts are longer than %(limit)s tokens and are shortened.")
            % {"cut": f"{cut:,}", "rows": f"{rows:,}", "limit": source}
        )
    if cut := measuring.longer(report, "response", target):
        told.append(
            _(
                "%(cut)s of %(rows)s responses are longer than %(limit)s tokens and are cut in "
                "mid-sentence."
            )
            % {"cut": f"{cut:,}", "rows": f"{rows:,}", "limit": target}
        )
    return told


def lengths_for(
    checkpoint: Checkpoint, max_source_length: int = 0, max_target_length: int = 0
) -> tuple[int, int]:
    """Longest prompt and response of a run with this base; 0: the preset's. ValidationError."""
    from tuning.plan import recipe_for  # which asks for reports here

    wish = {"max_source_length": max_source_length, "max_target_length": max_target_length}
    recipe = recipe_for(checkpoint, None, **{name: value for name, value in wish.items() if value})
    return recipe.max_source_length, recipe.max_target_length


def row_as_trained(
    version: DatasetVersion, split: str, line: int, checkpoint: Checkpoint, source: int, target: int
) -> list[dict[str, Any]]:
    """`measuring.row_as_trained` in a process of its own. ValidationError when it cannot be told.

    source, target: the longest prompt and response, in tokens.
    """
    if not 1 <= line <= version.splits[split]["rows"]:
        message = _("There is no line %(line)s; the split has %(rows)s rows.")
        words = {"line": line, "rows": version.splits[split]["rows"]}
        raise ValidationError(message % words, "no_such_line")
    sha256 = version.splits[split]["sha256"]
    return _told("row_as_trained", str(checkpoint.path), sha256, line, source, target)


def task_tokens(checkpoint: Checkpoint, text: str) -> int:
    """`measuring.task_tokens` in a process of its own. ValidationError when it cannot be told."""
    return _told("task_tokens", str(checkpoint.path), text)


def _told(*question: Any) -> Any:
    unreadable = _("The base's tokenizer, or the row, cannot be read.")
    if not _rows_at_once.acquire(timeout=10):
        raise ValidationError(_("Too many are looking at rows. Try again."), "busy")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tuning.datasets.measuring"],
            input=json.dumps(question).encode(),
            capture_output=True,
            cwd=_ROOT,
            env={**os.environ, "PORTAL_DATA_DIR": str(settings.DATA_DIR)},
            timeout=_PATIENCE,
        )
        found = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as fault:
        logger.error("%s was not answered: %s", question[0], fault)
        raise ValidationError(unreadable, "unreadable") from fault
    finally:
        _rows_at_once.release()
    if "error" in found:
        raise ValidationError(f"{unreadable} ({found['error']})", "unreadable")
    return found["answer"]
