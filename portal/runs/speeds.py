"""How long a run will take, from what ended lately."""

from __future__ import annotations

import statistics

from portal.models import Run
from portal.runs.work import work_of

MEASURED = 5  # ended runs whose speed an estimate is made of


class Speeds:
    """Seconds for each unit of the kind's size, looked up once for each kind and base."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], float | None] = {}

    def seconds(self, run: Run) -> float | None:
        size = work_of(run.kind).size(run.recipe)
        if not size:
            return None
        base = (run.recipe.get("checkpoint") or {}).get("name", "")
        if (run.kind, base) not in self._known:
            self._known[run.kind, base] = self._measured(run.kind, base)
        each = self._known[run.kind, base]
        return None if each is None else each * size

    def _measured(self, kind: str, base: str) -> float | None:
        ended = Run.objects.filter(
            kind=kind, recipe__checkpoint__name=base, status=Run.Status.SUCCEEDED
        ).order_by("-id")[:MEASURED]
        speeds = [
            run.seconds / size
            for run in ended
            if run.seconds and (size := work_of(kind).size(run.recipe))
        ]
        return statistics.median(speeds) if speeds else None
