"""A download, carried out: fetch, move to its place, register.

Asked to stop it ends at once: every byte that has come stays in the work folder, where the next
attempt goes on.
"""

from __future__ import annotations

import logging
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from django.core.exceptions import ValidationError

from chat.checkpoints.describe import CheckpointInvalid
from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.progress import Watch
from chat.checkpoints.fetch.sources import HubRepository, Source, parse_source, work_folder
from chat.inventory import incoming, made_before, move_in
from chat.models import FetchRun
from chat.registry import free_name, register_checkpoint
from portal.models import Run
from portal.runs.heartbeat import Heartbeat, RunFailed
from portal.runs.work import RunWork

TELL = 0.5  # seconds between two words about the transfer


class FetchWork(RunWork):
    kind = Run.Kind.FETCH  # type: ignore[assignment]  # a member, which mypy takes for its value
    model = FetchRun
    queue = "default"

    def work(self, heartbeat: Heartbeat) -> None:
        from chat.checkpoints.fetch.fetch import fetch

        # one line per request would fill the log
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        run = self.run
        heartbeat.tell(phase=Run.Phase.STARTING)
        self.log(f"run {run.pk}, attempt {run.attempt}: {run.source}")
        place = made_before(run.pk)
        if place is None:
            try:
                source = parse_source(run.recipe["source"])
                work = work_folder(incoming(), source)
                folder = fetch(
                    source,
                    work,
                    Watch(Teller(heartbeat, run, self.log), heartbeat.check),
                    self._settings(source),
                )
            except (FetchFailed, CheckpointInvalid) as fault:
                raise RunFailed(fault.code, str(fault)) from fault
            heartbeat.work_asks = True  # from here on it takes no time and must not be cut
            place = move_in(folder, run.name, run.pk)
            shutil.rmtree(work, ignore_errors=True)
        heartbeat.work_asks = True
        heartbeat.tell(phase=Run.Phase.SAVING)
        self._register(place, heartbeat)

    def _settings(self, source: Source) -> Any:
        from chat.checkpoints.fetch.fetch import Settings

        if not isinstance(source, HubRepository):
            return Settings()
        token = None
        if source.hub == "hf":
            from huggingface_hub import get_token

            token = get_token()  # HF_TOKEN, or who has logged in with `hf auth login`
        return Settings(endpoints={source.hub: self.run.recipe["endpoints"]}, token=token)

    def _register(self, place: Path, heartbeat: Heartbeat) -> None:
        name = free_name(self.run.recipe["name"] or self.run.name, 100)
        try:
            checkpoint = register_checkpoint(place, name, default=self.run.recipe["default"])
        except ValidationError as error:
            if "already_registered" not in str(error.error_dict):
                shutil.rmtree(place, ignore_errors=True)  # nothing half-registered
            raise
        self.log(f"checkpoint “{checkpoint.name}” in {place}")
        rows = FetchRun.objects.filter(pk=self.run.pk)
        heartbeat.tell(lambda: rows.update(checkpoint=checkpoint))


class Teller:
    """Carries news of a transfer to the run's row, not more often than somebody could read."""

    def __init__(self, heartbeat: Heartbeat, run: FetchRun, log):
        self._heartbeat, self._log = heartbeat, log
        self._rows = FetchRun.objects.filter(pk=run.pk)
        self._phase, self._told = "", 0.0

    def __call__(self, snapshot: dict[str, Any]) -> None:
        now, phase = time.monotonic(), snapshot["phase"]
        complete = snapshot["done"] == snapshot["total"]
        if phase == self._phase and now - self._told < TELL and not complete:
            return
        if phase and phase != self._phase:
            self._log(f"{phase}: {snapshot['total'] / 2**20:,.1f} MiB")
        self._phase, self._told = phase, now
        self._heartbeat.tell(
            partial(self._rows.update, transfer=snapshot),
            progress=snapshot["done"] >> 10,
            total=snapshot["total"] >> 10,
            **({"phase": phase} if phase in Run.Phase.values else {}),
        )
