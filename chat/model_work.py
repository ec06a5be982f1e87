"""What every run that computes with base weights does first: choose a device, wait until it is
free, load the checkpoint and make sure that it is the one of the plan.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from django.conf import settings

from chat.checkpoints.describe import CheckpointInvalid
from portal.models import Run
from portal.runs import device_lock
from portal.runs.heartbeat import Heartbeat, RunFailed
from portal.runs.work import RunWork

if TYPE_CHECKING:
    from chat.engine.loading import Loaded


class ModelWork(RunWork):
    """A run with a `checkpoint` and `recipe["checkpoint"]["fingerprint"]`; one at a time on each
    device.
    """

    queue = "gpu"

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
    def held_devices(self, heartbeat: Heartbeat, plan: str, count: int = 1) -> Iterator[str]:
        """`count` devices that are this run's alone until the block ends: the kind of several
        ("cuda"), or the name of one. Processors count as one device, which processes share.
        """
        from chat.engine import loading

        device = settings.DEVICE or str(loading.default_device())
        if device == "cpu":
            os.nice(5)  # chat comes first: its worker shares these processors
            wanted = [device]
        elif count == 1:
            wanted = [device]
        else:
            device = device.partition(":")[0]
            wanted = [f"{device}:{number}" for number in range(count)]
        run = self.run
        self.log(
            f"run {run.pk}, attempt {run.attempt}: {run.checkpoint} on {', '.join(wanted)}, {plan}"
        )
        with contextlib.ExitStack() as locks:
            for one in wanted:
                locks.enter_context(device_lock.hold(one, heartbeat.waiting))
            heartbeat.tell(phase=Run.Phase.LOADING)
            yield device
