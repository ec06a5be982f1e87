"""What every run that computes with base weights does first: ask for a device and wait until it is
granted one, load the checkpoint and make sure that it is the one of the plan.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from django.conf import settings

from chat.checkpoints import memory
from chat.checkpoints.describe import CheckpointInvalid
from portal.devices import arbiter, holding, inventory
from portal.devices.placing import Granted, Wish, torch_device
from portal.models import Run
from portal.runs.heartbeat import Heartbeat, RunFailed
from portal.runs.work import RunWork

if TYPE_CHECKING:
    from chat.engine.loading import Loaded


class ModelWork(RunWork):
    """A run with a `checkpoint` and `recipe["checkpoint"]["fingerprint"]`; one at a time on each
    device.
    """

    queue = "gpu"
    granted: Granted | None = None  # while the checkpoint is loaded

    def bytes_needed(self, device: str) -> tuple[int, int] | None:
        """(comfortably, at least) on a device of that kind; None where the checkpoint's description
        says too little.
        """
        run = self.run
        precision = memory.held_as(
            run.checkpoint.description, device, run.recipe.get("quantization_bit")
        )
        for estimate in memory.estimates(run.checkpoint.description):
            if (estimate.use, estimate.precision) == ("chat", precision):
                return estimate.bytes, estimate.bytes
        return None

    def wish(self) -> Wish:
        """On any declared device, or as ever: on PORTAL_DEVICE, or on all the cards there are."""
        names = tuple(device.name for device in inventory.register())
        if not settings.DEVICES and ":" in settings.DEVICE:
            names = (settings.DEVICE,)
        kind = "cuda" if any(name.startswith("cuda") for name in names) else "cpu"
        needed = self.bytes_needed(kind)
        if needed is None:  # the files, and half as much for what is computed
            size = int(self.run.checkpoint.description.get("bytes") or 0)
            needed = (size * 3 // 2 + memory.PROGRAM,) * 2
        most, least = needed
        together = not settings.DEVICES and len(names) > 1
        return Wish(arbiter.holder_of(self.run), self.kind, most, least, names, together)

    @contextlib.contextmanager
    def loaded_model(
        self, heartbeat: Heartbeat, plan: str, *, quantization_bit: int | None, dtype: Any = None
    ) -> Iterator[Loaded]:
        """The checkpoint on its device, which is this process's alone until the block ends. `plan`:
        what will be done, for the log. dtype None: the checkpoint's own.
        """
        from transformers.utils.logging import disable_progress_bar

        from chat.engine import loading

        disable_progress_bar()  # the log is a file
        run = self.run
        with self.held_devices(heartbeat, plan) as device:
            try:
                loaded = loading.load(
                    run.checkpoint.path,
                    device=device,
                    dtype=dtype,
                    quantization_bit=quantization_bit,
                )
            except (CheckpointInvalid, OSError) as fault:
                raise RunFailed(
                    "checkpoint_invalid", f"the checkpoint cannot be loaded: {fault}"
                ) from fault
            if loaded.fingerprint != run.recipe["checkpoint"]["fingerprint"]:
                raise RunFailed(
                    "checkpoint_changed",
                    "the checkpoint's files are not those that the run was planned with",
                )
            heartbeat.check()
            yield loaded

    @contextlib.contextmanager
    def held_devices(self, heartbeat: Heartbeat, plan: str) -> Iterator[str]:
        """The run's devices (`wish`), its alone among runs until the block ends, as torch calls
        them: the name of one, or the kind of several.
        """
        from chat.engine import loading

        run = self.run
        with contextlib.ExitStack() as held:
            self.granted = held.enter_context(
                holding.hold(run, self.wish(), heartbeat, self.log, label=run.checkpoint.name)
            )
            device = settings.DEVICE or str(loading.default_device())
            if settings.DEVICES:
                device = torch_device(list(self.granted.shares))
            if device == "cpu":
                os.nice(5)  # chat comes first: its worker shares these processors
            self.log(f"run {run.pk}, attempt {run.attempt}: {run.checkpoint} on {device}, {plan}")
            heartbeat.tell(phase=Run.Phase.LOADING)
            yield device
