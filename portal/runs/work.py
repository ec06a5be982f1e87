"""The kinds of long work. A kind is one subclass of RunWork, registered in its app's
`AppConfig.ready`; queue, process, heartbeat and reaper know nothing else of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from portal.models import Run

if TYPE_CHECKING:
    from portal.runs.figures import Figure
    from portal.runs.heartbeat import Heartbeat, Log


class RunWork:
    """What carries out one claimed run, in a process of its own (portal/runs/process.py).

    The module of a subclass is imported by the web process too, so what is heavy (torch) is
    imported inside `work`.
    """

    kind: ClassVar[Run.Kind]
    model: ClassVar[type[Run]]
    queue: ClassVar[str]  # "gpu": one at a time; "default": what needs no device

    def __init__(self, run_id: int, log: Log):
        self.run, self.log = self.load(run_id), log

    def load(self, run_id: int) -> Run:
        """The run's row with what the work reads of it."""
        return self.model.objects.select_related("owner").get(pk=run_id)

    def work(self, heartbeat: Heartbeat) -> None:
        """Returns when all is done; raises StopRequested when it stopped on the way, RunFailed (or
        anything else) when it cannot go on.
        """
        raise NotImplementedError

    @classmethod
    def size(cls, recipe: dict) -> int:
        """How long a run of this plan takes beside others of its kind: steps or rows; 0: not
        known before.
        """
        return 0

    def after_success(self) -> None:
        """What is left to do once the row says that the run has succeeded."""

    def figures(self) -> list[Figure]:
        """What it measured, for those who keep figures elsewhere; the run has ended."""
        return []


_KINDS: dict[str, type[RunWork]] = {}


def register(work: type[RunWork]) -> None:
    _KINDS[work.kind] = work


def work_of(kind: str) -> type[RunWork]:
    """The class that carries out runs of this `Run.kind`."""
    return _KINDS[kind]


def queues() -> list[str]:
    """The queue of the device first."""
    return sorted({work.queue for work in _KINDS.values()}, key=lambda name: (name != "gpu", name))
