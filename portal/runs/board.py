"""The queue board: what runs, what waits, in which order, why, and about when it begins; and what
an admin does about it. Every decision is noted with who and when
(portal/audit.py).
"""

from __future__ import annotations

import hashlib
import heapq
import math
from dataclasses import dataclass, field
from datetime import timedelta

from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils.translation import gettext as _

from portal import audit
from portal.devices.overview import why_runs_wait
from portal.models import QueueHold, Run
from portal.runs import lifecycle
from portal.runs.speeds import Speeds
from portal.runs.waiting import waiting_order
from portal.runs.work import queues

PRIORITIES = {"normal": Run.Priority.NORMAL, "low": Run.Priority.LOW}


class OrderChanged(ValidationError):
    """Somebody else has reordered, or a run has begun or ended, since the list was read."""


@dataclass
class Waiting:
    run: Run
    place: int  # 1: next
    reason: str  # a sentence in the active language
    starts_in: timedelta | None  # None: not known


@dataclass
class Queue:
    name: str
    hold: QueueHold | None
    running: list[Run]
    waiting: list[Waiting] = field(default_factory=list)

    @property
    def label(self) -> str:
        return _("Accelerator") if self.name == "gpu" else _("Downloads")

    @property
    def version(self) -> str:
        """Changes with the order: what a reordering must have seen."""
        ids = ",".join(str(entry.run.pk) for entry in self.waiting)
        return hashlib.sha256(ids.encode()).hexdigest()[:12]


def board() -> list[Queue]:
    """Every queue in which something runs, waits or is held, and the one of the device."""
    active = list(Run.objects.filter(status__in=Run.ACTIVE).select_related("owner"))
    waits = why_runs_wait()
    for run in active:
        run.wait_reason = waits.get(run.pk, "")
    holds = {hold.queue: hold for hold in QueueHold.objects.select_related("by")}
    names = {run.queue for run in active} | set(holds) | {"gpu"}
    return [_queue(name, active, holds.get(name)) for name in sorted(names, key=queues().index)]


def _queue(name: str, active: list[Run], hold: QueueHold | None) -> Queue:
    here = {run.pk: run for run in active if run.queue == name}
    running = sorted(
        (run for run in here.values() if run.status == Run.Status.RUNNING),
        key=lambda run: (run.started_at or run.created_at, run.pk),
    )
    queue = Queue(name, hold, running)
    order = (
        [here[pk] for pk in waiting_order(name) if pk in here] if len(here) > len(running) else []
    )
    speeds = Speeds() if order else None
    free_in = _free_in(name, running)
    for place, run in enumerate(order, 1):
        before = order[place - 2] if place > 1 else (running[-1] if running else None)
        reason = _why(run, before, hold)
        begins = heapq.heappop(free_in)
        starts_in = None if hold or begins == math.inf else timedelta(seconds=begins)
        queue.waiting.append(Waiting(run, place, reason, starts_in))
        took = speeds.seconds(run) if speeds else None
        heapq.heappush(free_in, math.inf if took is None else begins + took)
    return queue


def _why(run: Run, before: Run | None, hold: QueueHold | None) -> str:
    if hold is not None:
        reason = hold.reason or _("maintenance")
        return _("The queue is held: %(reason)s") % {"reason": reason}
    if run.interrupted_at is not None:
        return _("It was interrupted and goes on first.")
    if before is None:
        return _("It begins now.")
    if before.status == Run.Status.RUNNING:
        return _("Next, when #%(run)s ends.") % {"run": before.pk}
    if run.priority == Run.Priority.LOW:
        return _("Low priority: when nobody else waits.")
    return _("Behind #%(run)s.") % {"run": before.pk}


def seconds_left(run: Run) -> float | None:
    """Of a running run, at its speed so far."""
    if not run.progress or not run.total or run.seconds is None:
        return None
    return run.seconds * max(0, run.total - run.progress) / run.progress


def _free_in(queue: str, running: list[Run]) -> list[float]:
    """A heap: in how many seconds each of the queue's workers is free; infinite where nobody
    knows.
    """
    left = [seconds_left(run) for run in running]
    known = [math.inf if seconds is None else seconds for seconds in left]
    idle = [0.0] * max(0, lifecycle.slots(queue) - len(known))
    found = sorted([*idle, *known])
    heapq.heapify(found)
    return found


# ------------------------------------------------------------------ decisions


def reorder(user, queue: str, ids: list[int], seen: str | None = None) -> None:
    """Puts these waiting runs in front, in this order; the others follow as before. seen: the
    `Queue.version` that the admin looked at.

    Raises OrderChanged, or ValidationError for an id that does not wait there.
    """
    with transaction.atomic():
        # one writer at a time: the rows are locked, where the database locks rows
        waiting = {
            run.pk: run
            for run in Run.objects.select_for_update().filter(queue=queue, status=Run.Status.QUEUED)
        }
        now = next((each for each in board() if each.name == queue), None)
        if seen is not None and (now is None or now.version != seen):
            raise OrderChanged(
                _("The order has changed in the meantime. Look again."), code="order_changed"
            )
        unknown = [pk for pk in ids if pk not in waiting]
        if unknown or len(set(ids)) != len(ids):
            message = _("#%(run)s does not wait in this queue.")
            wrong = unknown[0] if unknown else ids[0]
            raise ValidationError(
                {"runs": ValidationError(message % {"run": wrong}, "not_waiting")}
            )
        Run.objects.filter(pk__in=waiting).update(rank=None)
        for rank, pk in enumerate(ids):
            Run.objects.filter(pk=pk, status=Run.Status.QUEUED).update(rank=rank)
        audit.note(user, QueueHold(queue=queue), f"order: {ids}")


def move(user, run: Run, places: int, seen: str | None = None) -> None:
    """A waiting run so many places forward (negative) or back."""
    order = waiting_order(run.queue)
    if run.pk not in order:
        raise OrderChanged(_("The run does not wait any more."), code="order_changed")
    at = order.index(run.pk)
    order.remove(run.pk)
    target = max(0, min(len(order), at + places))
    order.insert(target, run.pk)
    reorder(user, run.queue, order[: max(at, target) + 1], seen)


def set_priority(user, run: Run, priority: int) -> bool:
    """False when the run does not wait any more."""
    changed = Run.objects.filter(pk=run.pk, status=Run.Status.QUEUED).update(
        priority=priority, **({"rank": None} if priority else {})
    )
    if changed:
        audit.note(user, run, f"priority: {Run.Priority(priority).name.lower()}")
    return bool(changed)


def cancel(user, run: Run) -> None:
    lifecycle.cancel(run)
    if user.pk != run.owner_id:
        audit.note(user, run, "cancelled")


def hold(user, queue: str, reason: str = "") -> QueueHold:
    """No new run of the queue begins; what runs goes on to its end."""
    held, new = QueueHold.objects.get_or_create(
        queue=queue, defaults={"reason": reason[:200], "by": user}
    )
    if new:
        audit.note(user, held, f"held: {reason[:200]}")
    return held


def drain(user, reason: str = "", *, checkpoint: bool = False) -> None:
    """For maintenance: nothing new begins in any queue. checkpoint: what runs saves and waits with
    the others; else it goes on to its end. `undrain` takes it back.
    """
    for queue in queues():
        held = hold(user, queue, reason)
        if checkpoint and not held.checkpoint:
            QueueHold.objects.filter(queue=queue).update(checkpoint=True)
            audit.note(user, held, "what runs saves and waits")


def undrain(user) -> None:
    for queue in queues():
        release(user, queue)


def drained() -> bool:
    """Is every queue held?"""
    held = set(QueueHold.objects.values_list("queue", flat=True))
    return held >= set(queues())


def release(user, queue: str) -> None:
    """Who waits is rung for, one for the queue: the next is chosen when it is answered."""
    deleted, _rows = QueueHold.objects.filter(queue=queue).delete()
    if not deleted:
        return
    audit.note(user, QueueHold(queue=queue), "released")
    for run_id in waiting_order(queue):
        lifecycle.ring(run_id)
