"""The budget of runs: what is set aside before a run waits, and what it has cost when it ends.

A run's owner pays; where they have not enough for it, the first of their teams (by name) that has.
A run that takes longer than was set aside is given more, STEP by STEP, until its payer has nothing
left (portal/budget/meter.py stops it then). An end is settled in the transaction that writes it
(portal/runs/lifecycle.py).
"""

from __future__ import annotations

from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import Sum
from django.db.models.signals import pre_delete
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from portal.budget import ledger, pricing
from portal.budget.models import DeviceUse, Hold
from portal.models import Run, Team, User
from portal.runs.speeds import Speeds

DEVICE_QUEUE = "gpu"  # runs of other queues use no device
UNKNOWN = 3_600_000  # ms that are set aside for a run of whose speed nothing is known
LEAST = 60_000  # ms that must be there for such a run
STEP = 300_000  # ms that a running run is given more at once

EXPLANATIONS = {
    "budget_spent": gettext_lazy(
        "The budget is used up. The run has kept what it has done, and goes on from there when "
        "there are units again."
    ),
}


class OverBudget(ValidationError):
    """Nobody who could pay has the units, or the tokens of the day are used up. wait: seconds."""

    def __init__(self, message: str, code: str, wait: int = 3600):
        super().__init__(message, code)
        self.wait = wait


def payers(user: User) -> list[ledger.Holder]:
    """Who pays for what this user does, in this order."""
    return [user, *user.teams.order_by("name")]


def estimate(run: Run) -> float | None:
    """Seconds that are left to do, at the speed of runs like it; None: not known."""
    seconds = Speeds().seconds(run)
    if seconds is None or not run.total:
        return seconds
    return seconds * max(0, run.total - run.progress) / run.total


def milliseconds(run_id: int) -> int:
    """How long the run has had a device, in all attempts."""
    return DeviceUse.objects.filter(run=run_id).aggregate(all=Sum("milliseconds"))["all"] or 0


@transaction.atomic
def open_for(run: Run) -> Hold | None:
    """Sets aside what the queued run will cost; None where nothing is to be paid. Raises
    OverBudget.
    """
    rate = pricing.device_rate() if run.queue == DEVICE_QUEUE else 0
    if not rate:
        return None
    seconds = estimate(run)
    wanted = pricing.of_device(UNKNOWN if seconds is None else round(seconds * 1000), rate)
    least = wanted if seconds is not None else pricing.of_device(LEAST, rate)
    most = 0
    for holder in payers(run.owner):
        free = ledger.left(holder)
        most = max(most, free)
        if free < max(1, least):
            continue
        hold = Hold.objects.create(
            run=Run.objects.get(pk=run.pk),
            payer=ledger.account_of(holder),
            rate=rate,
            settled_before=milliseconds(run.pk),
        )
        # what somebody else was quicker to take is not there any more
        if ledger.reserve(hold, wanted, about=_about(run)) >= max(1, least):
            return hold
        break
    if not most:
        raise OverBudget(
            _("There are no units for this run: an administrator gives them."), "budget_too_small"
        )
    message = _("The run needs about %(needs)s units; %(left)s are left.")
    told = {"needs": pricing.in_words(max(1, least)), "left": pricing.in_words(most)}
    raise OverBudget(message % told, "budget_too_small")


def close_for(run_id: int) -> None:
    """Settles what the run has cost, once; nothing where nothing is held."""
    open_holds = Hold.objects.filter(run=run_id, closed_at=None).select_related("payer", "run")
    for hold in open_holds:
        ledger.settle(hold, cost(hold), about=_about(hold.run))


def cost(hold: Hold) -> int:
    """Of the device time since the hold was opened, in micro-units."""
    if hold.run_id is None:
        return 0
    return pricing.of_device(milliseconds(hold.run_id) - hold.settled_before, hold.rate)


def why_stopped(run_id: int) -> dict | None:
    """The error of a run that was stopped at the limit."""
    newest = (
        Hold.objects.filter(run=run_id, run__paused=True)
        .select_related("payer")
        .order_by("-id")
        .first()
    )
    if newest is None or not newest.at_limit:
        return None
    return {"code": "budget_spent", "message": f"the budget of {newest.payer.name} is used up"}


def _about(run: Run | None) -> str:
    return f"#{run.pk} {run.name}" if run is not None else ""


def settle_before_deletion() -> None:
    """Called once: what is held is settled while the rows still say what it was for, and what a
    user or a team leaves goes back to the pool.
    """
    pre_delete.connect(_run_goes, sender=Run, dispatch_uid="budget")
    for model in (User, Team):
        pre_delete.connect(_holder_goes, sender=model, dispatch_uid="budget")


def _run_goes(instance: Run, **signal) -> None:
    close_for(instance.pk)


def _holder_goes(instance: ledger.Holder, **signal) -> None:
    whose = {"payer__team" if isinstance(instance, Team) else "payer__user": instance}
    for hold in Hold.objects.filter(closed_at=None, **whose).select_related("payer", "run"):
        ledger.settle(hold, cost(hold), about=_about(hold.run))
    ledger.close(instance)


def tidy() -> None:
    """Has grants follow the clock, and settles holds whose runs have ended or are gone, if any is
    left. The reaper calls it every few seconds.
    """
    if not pricing.on():
        return
    ledger.sweep()
    left = Hold.objects.filter(closed_at=None).exclude(run__status__in=Run.ACTIVE)
    for hold in left.select_related("payer", "run"):
        ledger.settle(hold, cost(hold), about=_about(hold.run))
