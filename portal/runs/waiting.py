"""Who is next: the order of the queued runs of one queue.

A run that lost its process, or stepped aside, goes on first; then what an admin has put in front,
in the admin's order. Then owners take turns: the one who has waited longest since one of theirs
last ran is next, with their oldest run. So nobody waits for all that another has put in before.
Runs of low priority take turns alike, behind all others.
"""

import heapq
from collections import defaultdict, deque
from datetime import UTC, datetime

from django.db.models import Max

from portal.models import Run

_NEVER = datetime.min.replace(tzinfo=UTC)


def waiting_order(queue: str) -> list[int]:
    """The ids of the queued runs, next first."""
    queued = Run.objects.filter(queue=queue, status=Run.Status.QUEUED).order_by("id")
    rows = list(
        queued.values_list("id", "owner_id", "created_at", "interrupted_at", "priority", "rank")
    )
    interrupted = [run_id for run_id, _owner, _at, lost_at, _low, _rank in rows if lost_at]
    ranked = sorted(
        (rank, run_id)
        for run_id, _o, _at, lost_at, _low, rank in rows
        if rank is not None and not lost_at
    )
    turns = [
        (run_id, owner, created_at, priority)
        for run_id, owner, created_at, lost_at, priority, rank in rows
        if rank is None and not lost_at
    ]
    order = [*interrupted, *(run_id for _rank, run_id in ranked)]
    if not turns:
        return order
    last_ran = dict(
        Run.objects.filter(queue=queue, owner__in={owner for _id, owner, _at, _low in turns})
        .order_by()
        .values_list("owner")
        .annotate(Max("heartbeat_at"))
    )
    for priority in sorted({priority for _id, _owner, _at, priority in turns}):
        alike = [(run_id, owner, at) for run_id, owner, at, its in turns if its == priority]
        order += _in_turns(alike, last_ran)
    return order


def _in_turns(runs: list[tuple[int, int, datetime]], last_ran: dict) -> list[int]:
    """runs: (id, owner, created at), oldest first."""
    waiting: dict[int, deque[int]] = defaultdict(deque)
    since: dict[int, datetime] = {}
    for run_id, owner, created_at in runs:
        waiting[owner].append(run_id)
        since.setdefault(owner, created_at)
    turns = [
        (0, max(since[owner], last_ran[owner] or _NEVER), own[0], owner)
        for owner, own in waiting.items()
    ]
    heapq.heapify(turns)
    order = []
    while turns:
        turn, waited_since, run_id, owner = heapq.heappop(turns)
        order.append(waiting[owner].popleft())
        if waiting[owner]:
            heapq.heappush(turns, (turn + 1, waited_since, run_id, owner))
    return order
