"""Who is next: the order of the queued runs of one queue.

A run that lost its process, or stepped aside, goes on first. Then owners take turns: the one who
has waited longest since one of theirs last ran is next, with their oldest run. So nobody waits for
all that another has put in before.
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
    interrupted: list[int] = []
    waiting: dict[int, deque[int]] = defaultdict(deque)
    since: dict[int, datetime] = {}
    for run_id, owner, created_at, interrupted_at in queued.values_list(
        "id", "owner_id", "created_at", "interrupted_at"
    ):
        if interrupted_at is not None:
            interrupted.append(run_id)
        else:
            waiting[owner].append(run_id)
            since.setdefault(owner, created_at)
    if not waiting:
        return interrupted

    last_ran = dict(
        Run.objects.filter(queue=queue, owner__in=waiting)
        .order_by()
        .values_list("owner")
        .annotate(Max("heartbeat_at"))
    )
    turns = [
        (0, max(since[owner], last_ran[owner] or _NEVER), runs[0], owner)
        for owner, runs in waiting.items()
    ]
    heapq.heapify(turns)
    order = interrupted
    while turns:
        turn, waited_since, run_id, owner = heapq.heappop(turns)
        order.append(waiting[owner].popleft())
        if waiting[owner]:
            heapq.heappush(turns, (turn + 1, waited_since, run_id, owner))
    return order
