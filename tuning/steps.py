"""Steps that a run saved on the way, as tuned models beside its own."""

import shutil

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from chat.models import Adapter
from chat.registry import publish_adapter
from tuning.models import TuningRun


def publish_saved_step(run: TuningRun, step: int) -> Adapter:
    """The tuned model of a saved step, published if it is not yet. ValidationError when the run
    has not saved that step, or not any more.
    """
    known = run.adapters.filter(step=step).order_by("pk").first()
    if known is not None:
        return known
    saved = run.steps_folder / f"step-{step}"
    if not saved.is_dir():
        message = _("Step %(step)s is not among those that the run keeps.")
        raise ValidationError(message % {"step": step}, "no_such_step")
    taken = run.folder / f"published-{step}"  # publishing moves the folder it is given
    shutil.copytree(saved, taken, dirs_exist_ok=True)
    return publish_adapter(
        taken,
        name=f"{run.name}-{step}"[-120:],
        checkpoint=run.checkpoint,
        owner=run.owner,
        run=run,
        step=step,
    )
