"""The life of a Run, and the only place that writes its status.

queued -> running -> succeeded | failed | cancelled; running -> queued when a process was lost or
asked to step aside.

The queue may deliver a task twice, late or never (docs/architecture.md, "Long work"). So a delivery
is only a doorbell: whoever answers claims the row with one conditional UPDATE and does nothing if
it loses. The claim sets a fresh token; every later write carries it, and a write that touches no
row means that the process has been fenced off and must stop.
"""

import enum
import logging
import secrets
from collections import Counter
from datetime import datetime, timedelta

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import F, Q
from django.utils import timezone
from django.utils.translation import gettext as _
from django_q.brokers import get_broker
from django_q.tasks import async_task
from redis import RedisError

from portal.budget import holds
from portal.models import QueueHold, Run
from portal.notices.notify import run_ended
from portal.runs.waiting import waiting_order
from portal.runs.work import work_of

logger = logging.getLogger(__name__)

LEASE = timedelta(seconds=30)  # a process that has not written for this long is lost
# a queued run at the head of its queue whose doorbell may be lost
RING_AGAIN = timedelta(seconds=30)
ANSWER = "portal.runs.children.answer_bell"  # what django-q2 calls with the queue's name

Status = Run.Status


class FencedOff(Exception):
    """Another process holds the run now, or it has ended: stop at once and write nothing."""


class TooManyQueued(ValidationError):
    """The owner has as many runs waiting as the portal takes."""


class Signal(enum.Enum):
    """What a heartbeat tells the working process."""

    CONTINUE = "continue"
    CANCEL = "cancel"
    STEP_ASIDE = "step aside"


def enqueue(run: Run, *, ring_bell: bool = True) -> None:
    """Saves a new run as queued in the queue of its kind, and rings that once the transaction is
    committed. ring_bell=False: for who claims the run in the same transaction.

    Raises TooManyQueued when the owner has enough runs waiting, and OverBudget when the units
    do not suffice (portal/budget/holds.py): then nothing is saved.
    """
    if ring_bell:
        _refuse_too_many(run)
    run.status, run.queue = Status.QUEUED, work_of(run.kind).queue
    with transaction.atomic():
        run.save()
        holds.open_for(run)
    if ring_bell:
        transaction.on_commit(lambda: ring(run.pk))


def _refuse_too_many(run: Run) -> None:
    most = settings.QUEUED_RUNS
    if Run.objects.filter(owner_id=run.owner_id, status=Status.QUEUED).count() >= most:
        message = _("You have %(most)s runs waiting already; wait for one, or cancel one.")
        raise TooManyQueued(message % {"most": most}, code="too_many_queued")


def ring(run_id: int) -> None:
    """Tells the queue that this run waits. Harmless to repeat. A broker that does not answer is
    told by the reaper, later.
    """
    run = Run.objects.get(pk=run_id)
    try:
        async_task(ANSWER, run.queue, cluster=run.queue, task_name=f"run-{run_id}")
    except RedisError as error:
        logger.warning("run %s waits, the queue could not be told: %s", run_id, error)
        return
    Run.objects.filter(pk=run_id).update(rung_at=timezone.now())


def claim_next(queue: str) -> tuple[int, str] | None:
    """(run id, fencing token) of the run whose turn it is (portal/runs/waiting.py), whichever the
    bell was rung for; None when nothing waits, or the queue is held.
    """
    if QueueHold.objects.filter(queue=queue).exists():
        return None
    for run_id in waiting_order(queue):
        token = claim(run_id)
        if token is not None:
            return run_id, token
    return None


def claim(run_id: int) -> str | None:
    """Takes a queued run and returns the new fencing token, or None when somebody else was first or
    it is not queued.
    """
    token, now = secrets.token_hex(16), timezone.now()
    claimed = Run.objects.filter(pk=run_id, status=Status.QUEUED).update(
        status=Status.RUNNING,
        token=token,
        attempt=F("attempt") + 1,
        started_at=now,
        heartbeat_at=now,
        lease_expires_at=now + LEASE,
        interrupted_at=None,
        rank=None,
        finished_at=None,
        error=None,
        phase=Run.Phase.STARTING,
    )
    return token if claimed else None


def _held(run_id: int, token: str):
    return Run.objects.filter(pk=run_id, token=token, status=Status.RUNNING)


def heartbeat(run_id: int, token: str, **progress) -> Signal:
    """Renews the lease and writes `progress`, `total`, `phase`. Raises FencedOff when the token is
    no longer the current one.
    """
    now = timezone.now()
    if not _held(run_id, token).update(heartbeat_at=now, lease_expires_at=now + LEASE, **progress):
        raise FencedOff(run_id)
    if Run.objects.filter(pk=run_id, cancel_requested=True).exists():
        return Signal.CANCEL
    held = QueueHold.objects.filter(checkpoint=True).values("queue")
    aside = Run.objects.filter(pk=run_id, queue__in=held).exists()
    return Signal.STEP_ASIDE if aside else Signal.CONTINUE


def _finish(run_id: int, token: str, status: str, error: dict | None = None) -> None:
    """Commits a terminal status, and what the run has cost, on its own. The token stays, so that
    the supervisor can tell its own run's end from a fence.
    """
    with transaction.atomic():
        if not _held(run_id, token).update(
            status=status,
            error=error,
            finished_at=timezone.now(),
            lease_expires_at=None,
            phase="",
            cancel_requested=False,
        ):
            raise FencedOff(run_id)
        holds.close_for(run_id)
        if status != Status.CANCELLED or error:  # its owner knows, unless the portal did it
            run_ended(run_id)


def succeed(run_id: int, token: str) -> None:
    _finish(run_id, token, Status.SUCCEEDED)


def fail(run_id: int, token: str, code: str, message: str) -> None:
    _finish(run_id, token, Status.FAILED, {"code": code, "message": message[:2000]})


def acknowledge_cancel(run_id: int, token: str) -> None:
    """The working process has stopped because cancel was asked for."""
    _finish(run_id, token, Status.CANCELLED, holds.why_stopped(run_id))


def step_aside(run_id: int, token: str) -> None:
    """Back to the queue without spending an attempt: the process was told to end (SIGTERM) and has
    saved what it had.
    """
    if not _held(run_id, token).update(
        status=Status.QUEUED,
        attempt=F("attempt") - 1,
        lease_expires_at=None,
        rung_at=None,
        interrupted_at=timezone.now(),
        phase="",
    ):
        raise FencedOff(run_id)


@transaction.atomic
def lost(run_id: int, token: str, reason: str) -> None:
    """The process died. Queued again while attempts are left, failed
    otherwise.
    """
    held = _held(run_id, token)
    if held.filter(cancel_requested=True).update(
        status=Status.CANCELLED,
        error=holds.why_stopped(run_id),
        finished_at=timezone.now(),
        lease_expires_at=None,
        cancel_requested=False,
        phase="",
    ):
        holds.close_for(run_id)
        return
    if held.filter(attempt__lt=F("max_attempts")).update(
        status=Status.QUEUED,
        lease_expires_at=None,
        rung_at=None,
        interrupted_at=timezone.now(),
        phase="",
    ):
        logger.warning("run %s lost its process (%s): queued again", run_id, reason)
        transaction.on_commit(lambda: ring(run_id))
    elif held.update(
        status=Status.FAILED,
        finished_at=timezone.now(),
        lease_expires_at=None,
        phase="",
        error={
            "code": "process_lost",
            "message": f"The process was lost in every attempt. Last: {reason}",
        },
    ):
        holds.close_for(run_id)
        run_ended(run_id)
        logger.error("run %s failed: %s", run_id, reason)


@transaction.atomic
def cancel(run: Run, *, to_go_on: bool = False) -> None:
    """A queued run ends here; a running one is told with its next heartbeat. Ended runs stay as
    they are. to_go_on: it is paused, and said to be.
    """
    Run.objects.filter(pk=run.pk, status__in=Run.ACTIVE).update(paused=to_go_on)
    if Run.objects.filter(pk=run.pk, status=Status.QUEUED).update(
        status=Status.CANCELLED, finished_at=timezone.now(), cancel_requested=False
    ):
        holds.close_for(run.pk)
        return
    Run.objects.filter(pk=run.pk, status=Status.RUNNING).update(cancel_requested=True)


@transaction.atomic
def resume(run: Run) -> bool:
    """Queues a failed or cancelled run again; it goes on from what it has saved. False when there
    is nothing to resume. Raises TooManyQueued and OverBudget.
    """
    _refuse_too_many(run)
    resumed = Run.objects.filter(pk=run.pk, status__in=(Status.FAILED, Status.CANCELLED)).update(
        status=Status.QUEUED,
        attempt=0,
        cancel_requested=False,
        paused=False,
        error=None,
        finished_at=None,
        rung_at=None,
        interrupted_at=None,
    )
    if resumed:
        holds.open_for(run)
        transaction.on_commit(lambda: ring(run.pk))
    return bool(resumed)


class Reaper:
    """Requeues runs whose process is lost and rings again for queued ones nobody came for. Belongs
    to the supervisor, which calls `reap` every few seconds.
    """

    def __init__(self):
        self._overdue: dict[int, datetime | None] = {}  # run id -> the heartbeat that is overdue

    def reap(self) -> set[str]:
        """Returns the queues that did not answer an earlier ring although nothing of theirs runs:
        their cluster is deaf.
        """
        now = timezone.now()
        self._requeue_lost(now)
        holds.tidy()
        running = Counter(Run.objects.filter(status=Status.RUNNING).values_list("queue", flat=True))
        busy = {queue for queue, count in running.items() if count >= slots(queue)}
        deaf = set()
        # Behind running runs the message waits in the broker; the time to answer it counts from
        # when the queue has a free worker.
        waiting = Run.objects.filter(status=Status.QUEUED)
        on_hold = set(QueueHold.objects.values_list("queue", flat=True))
        waiting.filter(queue__in=busy | on_hold).exclude(rung_at=None).update(rung_at=now)
        # When the clock was set back, times from then lie ahead.
        waiting.filter(rung_at__gt=now).update(rung_at=now)
        for run in waiting.exclude(queue__in=busy | on_hold).filter(
            Q(rung_at=None) | Q(rung_at__lt=now - RING_AGAIN)
        ):
            if run.rung_at is not None and not running[run.queue]:
                deaf.add(run.queue)
            ring(run.pk)
        return deaf

    def _requeue_lost(self, now: datetime) -> None:
        """A lease that is over is looked at twice: where the clock was set forward, or the database
        was away from everybody, a living process renews it in between.
        """
        running = Run.objects.filter(status=Status.RUNNING)
        # A lease from before the clock was set back: renewed by the next beat, or it is over then.
        running.filter(lease_expires_at__gt=now + LEASE).update(lease_expires_at=now + LEASE)
        overdue = {}
        for run in running.filter(lease_expires_at__lt=now):
            if run.pk in self._overdue and self._overdue[run.pk] == run.heartbeat_at:
                lost(run.pk, run.token, "no heartbeat before the lease ended")
            else:
                overdue[run.pk] = run.heartbeat_at
        self._overdue = overdue


def slots(queue: str) -> int:
    """Runs of the queue that go on at the same time on one machine."""
    cluster = settings.Q_CLUSTER["ALT_CLUSTERS"].get(queue, settings.Q_CLUSTER)
    return cluster["workers"]


def forget_deliveries(queue: str) -> None:
    """Drops what the broker still holds for a cluster that has died, and has its queued runs rung
    anew.

    The broker would give those messages back only after `retry`, which lies above any run's length.
    """
    try:
        get_broker(queue).purge_queue()
    except RedisError as error:  # what stays there is one more bell
        logger.warning("the queue %s could not be emptied: %s", queue, error)
    Run.objects.filter(queue=queue, status=Status.QUEUED).update(rung_at=None)
