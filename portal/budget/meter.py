"""Measures how long a run has its device, and stops it when its payer has nothing left.

The time is the process's own (monotonic): a clock that is set does not change it. It is written
with each heartbeat, in the transaction that the fencing token guards, so an attempt that was fenced
off counts nothing, a beat that failed is counted with the next, and a process that is killed loses
less than two beats.
"""

from __future__ import annotations

import time

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from portal import audit
from portal.budget import holds, ledger, pricing, signals
from portal.budget.models import DeviceUse, Hold
from portal.models import Run
from portal.runs import lifecycle

WAITING = {Run.Phase.STARTING, Run.Phase.WAITING}  # phases in which the run has no device


class Meter:
    """Of one process of one run."""

    def __init__(self, run: Run):
        self._run = run
        self._counts = run.queue == holds.DEVICE_QUEUE
        self._model = model_of(run)
        self._since = self._until = time.monotonic()
        self._paid_for: bool | None = None  # whether the run has a hold

    def write(self, phase: str) -> None:
        """Called in each heartbeat's transaction, which may be rolled back."""
        self._until = self._since
        if not self._counts:
            return
        passed = int((time.monotonic() - self._since) * 1000)
        self._until += passed / 1000  # what is less than a millisecond counts with the next
        if phase in WAITING or not passed:
            return
        today = DeviceUse.objects.filter(run=self._run.pk, day=timezone.localdate())
        if not today.update(milliseconds=F("milliseconds") + passed):
            DeviceUse.objects.create(
                run_id=self._run.pk,
                user_id=self._run.owner_id,
                day=timezone.localdate(),
                kind=self._run.kind,
                model=self._model,
                milliseconds=passed,
            )
        self._watch_the_limit()

    def committed(self) -> None:
        """What was written counts."""
        self._since = self._until

    def _watch_the_limit(self) -> None:
        if self._paid_for is None:
            self._paid_for = Hold.objects.filter(run=self._run.pk, closed_at=None).exists()
        if not self._paid_for:
            return
        newest = Hold.objects.filter(run=self._run.pk).select_related("payer").latest("id")
        if newest.at_limit:
            return
        if newest.closed_at is None:  # else its payer has gone
            due = holds.cost(newest)
            if due < newest.amount:
                return
            more = due - newest.amount + pricing.of_device(holds.STEP, newest.rate)
            ledger.reserve(newest, more, about=f"#{self._run.pk} {self._run.name}")
            if due < newest.amount:
                return
        _stop(self._run, newest)


def _stop(run: Run, hold: Hold) -> None:
    """As when somebody pauses it: it saves its state, and can go on later."""
    Hold.objects.filter(pk=hold.pk).update(at_limit=True)
    lifecycle.cancel(run, to_go_on=True)
    # decided for its payer by what an admin gave
    audit.note(run.owner, run, f"budget: stopped, the units of {hold.payer.name} are used up")
    transaction.on_commit(
        lambda: signals.limit_reached.send(Run, run=run, account=hold.payer),
    )


def model_of(run: Run) -> str:
    """base or base:adapter, as answers call it."""
    base = (run.recipe.get("checkpoint") or {}).get("name", "")
    adapter = (run.recipe.get("adapter") or {}).get("name", "")
    if run.kind == Run.Kind.TUNING:
        adapter = run.name
    return f"{base}:{adapter}" if adapter else base
