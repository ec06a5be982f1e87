"""Checkpoints that tuning runs make: who may, whether the machine can, how they become known."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.template.defaultfilters import filesizeformat
from django.utils.translation import gettext as _

from chat.checkpoints import memory
from chat.inventory import made_before, move_in
from chat.models import Checkpoint
from chat.registry import free_name, register_checkpoint
from tuning.models import TuningRun
from tuning.ptuning.recipe import FULL, METHOD, Recipe


def told_of(run: TuningRun) -> dict[str, Any]:
    """What the checkpoint's source.json says."""
    base = run.checkpoint
    return {
        "source": f"run {run.pk} ({run.recipe['method']}) on {base.name}",
        "revision": base.fingerprint,
        "licence": base.description.get("licence", ""),
        "run": run.pk,
    }


def publish(run: TuningRun, folder: Path) -> Checkpoint:
    """Moves the folder among the checkpoints and gives it a row, named after the run; once, however
    often a run that was killed comes here.
    """
    place = made_before(run.pk)
    if place is None:
        place = move_in(folder, run.name, run.pk)
    shutil.rmtree(folder, ignore_errors=True)
    known = Checkpoint.objects.filter(path=str(place.resolve())).first()
    if known is not None:
        return known
    return register_checkpoint(place, free_name(run.name, 100), run=run)


def problems_of(owner, checkpoint: Checkpoint, recipe: Recipe) -> dict[str, list]:
    """Why this user, on this machine, cannot have a run that ends as a checkpoint."""
    found: dict[str, list] = {}
    if recipe.method == METHOD:
        return found
    if not owner.is_staff:
        message = _(
            "This method makes a model for the whole team; that is for administrators. P-tuning v2 "
            "is for everybody."
        )
        found["method"] = [ValidationError(message, "administrators_only")]
    if checkpoint.description.get("quantization_bit"):
        message = _("The weights of “%(name)s” are packed: only a prefix can be trained for it.")
        found["checkpoint"] = [ValidationError(message % {"name": checkpoint.name}, "packed")]
    elif recipe.method == FULL and not settings.LAUNCHER:  # which may find a larger machine
        problem = _too_large(checkpoint, recipe)
        if problem is not None:
            found["method"] = [*found.get("method", ()), problem]
    return found


def _too_large(checkpoint: Checkpoint, recipe: Recipe) -> ValidationError | None:
    precision = "float32" if recipe.precision == "float32" else _usual_precision(checkpoint)
    needed = memory.full(checkpoint.description, precision)
    if needed is None or needed.fits:
        return None
    parts = {term.name: filesizeformat(term.bytes) for term in needed.terms}
    message = _(
        "Full fine-tuning of “%(name)s” needs about %(needed)s of memory (weights %(weights)s, "
        "gradients %(gradients)s, the optimiser's state %(optimiser)s); this machine has "
        "%(available)s. P-tuning v2 and LoRA need far less."
    )
    figures = {
        "name": checkpoint.name,
        "needed": filesizeformat(needed.bytes),
        "available": filesizeformat(needed.available),
        **{name: parts[name] for name in ("weights", "gradients", "optimiser")},
    }
    return ValidationError(message % figures, "too_little_memory")


def _usual_precision(checkpoint: Checkpoint) -> str:
    """What `auto` computes in: float32 on a processor."""
    if memory.machine().device == "cpu" or checkpoint.description.get("dtype") == "float32":
        return "float32"
    return "bfloat16"
