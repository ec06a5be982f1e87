"""What the workers are to serve, and what became of each change of it. The default checkpoint is
the wish; workers follow it (chat/supply.py) and take it back when it cannot be served.
"""

import logging

from django.db import transaction
from django.utils.translation import gettext as _

from chat.models import Checkpoint, Precision, ServingSwitch
from chat.registry import make_default
from portal.rest.conventions import Conflict

logger = logging.getLogger(__name__)


@transaction.atomic
def serve(checkpoint: Checkpoint, user) -> ServingSwitch:
    """Makes it the default; the worker changes over. Conflict: it is that already, or has no
    weights here.
    """
    checkpoint = Checkpoint.objects.select_for_update().get(pk=checkpoint.pk)
    if not checkpoint.path:
        raise Conflict(
            _("“%(name)s” has its weights elsewhere: it is served there.")
            % {"name": checkpoint.name},
            "served_elsewhere",
        )
    if checkpoint.is_default:
        raise Conflict(
            _("“%(name)s” is served already.") % {"name": checkpoint.name}, "served_already"
        )
    make_default(checkpoint, user)
    return ServingSwitch.objects.filter(checkpoint=checkpoint).latest("id")


@transaction.atomic
def set_precision(checkpoint: Checkpoint, precision: str, user) -> None:
    """How its weights are held from the next load on; of the default that is at once. Conflict:
    this one cannot.
    """
    if precision and checkpoint.description.get("quantization_bit"):
        raise Conflict(
            _("The weights of “%(name)s” are packed already.") % {"name": checkpoint.name},
            "packed_already",
        )
    if precision not in ("", *Precision.values):
        raise Conflict(_("The precision is int8, int4 or empty."), "invalid_precision")
    before = checkpoint.precision
    if precision == before:
        return
    checkpoint.precision = precision
    checkpoint.save(update_fields=["precision"])
    logger.info(
        "checkpoint %s: precision %r in place of %r, set by %s",
        checkpoint.name,
        precision,
        before,
        user.username,
    )
    if checkpoint.is_default and checkpoint.path:
        ServingSwitch.record(checkpoint, checkpoint, before, user)


def latest(checkpoint: Checkpoint | None = None) -> ServingSwitch | None:
    switches = ServingSwitch.objects.select_related("checkpoint", "previous", "requested_by")
    if checkpoint is not None:
        switches = switches.filter(checkpoint=checkpoint)
    return switches.first()
