"""A check, carried out: every row measured, the report written to the run's row."""

from __future__ import annotations

from chat.checkpoints.describe import CheckpointInvalid
from portal.models import Run
from portal.runs.heartbeat import Heartbeat, RunFailed
from portal.runs.work import RunWork
from tuning.models import CheckRun


class CheckWork(RunWork):
    kind = Run.Kind.CHECK  # type: ignore[assignment]  # a member, which mypy takes for its value
    model = CheckRun
    queue = "default"

    def load(self, run_id: int) -> CheckRun:
        return CheckRun.objects.select_related("owner", "checkpoint", "dataset_version").get(
            pk=run_id
        )

    def work(self, heartbeat: Heartbeat) -> None:
        """Asked to stop it ends at once; a later attempt begins anew: it takes seconds."""
        from tuning.datasets import measuring

        run = self.run
        dataset, folder = run.recipe["dataset"], str(run.checkpoint.path)
        self.log(f"run {run.pk}, attempt {run.attempt}: {dataset['rows']:,} rows, {folder}")
        heartbeat.tell(phase=Run.Phase.LOADING)

        def report(done: int) -> None:
            heartbeat.check()
            heartbeat.tell(phase=Run.Phase.CHECKING, progress=done)

        try:
            found = measuring.measure(folder, dataset["sha256"], dataset["rows"], report)
        except CheckpointInvalid as fault:
            raise RunFailed("checkpoint_invalid", str(fault)) from fault
        rows = CheckRun.objects.filter(pk=run.pk)
        heartbeat.work_asks = True  # from here on it takes no time and must not be cut
        heartbeat.tell(lambda: rows.update(report=found), progress=dataset["rows"])
        self.log(f"{found['near_duplicates']['count']:,} rows nearly equal to an earlier one")
