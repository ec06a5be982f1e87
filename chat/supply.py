"""The worker's side of chat/serving.py: it loads what the rows say, and writes into them how that
went. In the worker's process only: torch is imported when something is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import platform
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
from django.conf import settings
from django.db import DatabaseError, close_old_connections, transaction
from django.utils import timezone

from chat.checkpoints.memory import PROGRAM, estimates, machine
from chat.models import Checkpoint, ServingSwitch
from chat.registry import remember_memory
from chat.worker.serving import EngineLike, Target
from chat.worker_claims import WorkerClaims

if TYPE_CHECKING:
    from chat.engine.engine import Engine

logger = logging.getLogger(__name__)

QUESTION = "你好"  # what a checkpoint is tried out with
SENTENCE_TOKENS = 24
BEGUN = tuple(status for status in ServingSwitch.ACTIVE if status != "waiting")


class LoadFailed(Exception):
    """`code`: too_large (for the whole machine) | memory_too_small (just now) | try_out_failed |
    checkpoint_changed | worker_died
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class DatabaseSupply:
    """A chat.worker.serving.Supply: `name` for ever, or with "" whatever the default is."""

    def __init__(self, name: str = "", address: str = ""):
        """address: where this worker listens; its claims are known by that, also after it was
        started again.
        """
        self._name = name
        self._claims = WorkerClaims(address or str(os.getpid()))
        self._switch: int | None = None  # the row of the change that goes on
        self._had: Target | None = None  # what was served last
        self._me = f"{platform.node()}:{os.getpid()}"

    # -- what is wanted

    def first(self) -> Target:
        """After a worker that ended while it changed over: what was served before."""
        close_old_connections()
        if not self._name:
            self._take_back_unfinished()
        target = self.wanted()
        if target is None:
            raise LoadFailed("no_checkpoint", "there is no checkpoint to serve")
        return target

    def wanted(self) -> Target | None:
        close_old_connections()
        found = self._row()
        return None if found is None else _target(found)

    def _row(self) -> Checkpoint | None:
        if self._name:
            return Checkpoint.objects.filter(name=self._name).first()
        return Checkpoint.default()

    def _take_back_unfinished(self) -> None:
        host = platform.node()
        for switch in ServingSwitch.objects.filter(status__in=BEGUN, worker__startswith=host + ":"):
            process = int(switch.worker.rpartition(":")[2])
            if process != os.getpid() and psutil.pid_exists(process):
                continue
            message = "the worker's process ended while it changed over (was memory too small?)"
            self._end_as_failed(switch, LoadFailed("worker_died", message))
            _restore(switch)

    # -- memory

    def reserve(self, target: Target) -> bool:
        return self._claims.reserve(target.key, target.name, _bytes_needed(_checkpoint(target)))

    def must_leave(self) -> bool:
        return self._claims.must_leave()

    def keep(self, targets: list[Target]) -> None:
        self._claims.keep([target.key for target in targets])

    def fits_beside(self, target: Target) -> bool:
        needed = _bytes_needed(_checkpoint(target))
        if needed is None or needed >= _free():
            return False
        return self._claims.reserve(target.key, target.name, needed, beside=True)

    # -- loading

    def load(self, target: Target) -> EngineLike:
        import torch

        from chat.engine.capacity import free_memory
        from chat.engine.engine import Engine, EngineConfig
        from chat.engine.loading import load

        self.release()
        threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
        if threads:
            torch.set_num_threads(threads)
        checkpoint = _checkpoint(target)
        if self._switch is not None:
            _check_room(checkpoint)
        before = _taken(settings.DEVICE)
        started = timezone.now()
        loaded = load(
            checkpoint.path,
            device=self._claims.torch_device() or settings.DEVICE or None,
            precision=checkpoint.precision or None,
        )
        if loaded.fingerprint != checkpoint.fingerprint:
            message = f"the files of {checkpoint.name} have changed since it was registered"
            raise LoadFailed("checkpoint_changed", f"{message}; register them again")
        device = loaded.device.type
        alone = self._had is None and device != "cuda"
        taken = _taken(device) if alone else max(_taken(device) - before, 1)
        program = PROGRAM if not alone and device != "cuda" else 0
        measured: dict[str, Any] = {
            "precision": checkpoint.precision or str(loaded.dtype).removeprefix("torch."),
            "device": device,
            "bytes": taken + program,
            "seconds": round((timezone.now() - started).total_seconds(), 1),
        }
        with contextlib.suppress(DatabaseError):
            remember_memory(checkpoint, measured)
        share = settings.CACHE_SHARE
        if settings.DEVICES:  # of the memory that is the portal's
            free = free_memory(loaded.device)
            room = self._claims.room_beside(target.key, measured["bytes"])
            share *= min(1.0, room / max(free, 1))
        engine = Engine(loaded, EngineConfig(cache_share=share))
        self._claims.took(target.key, measured["bytes"] + engine.cache.nbytes)
        return engine

    def try_out(self, engine: EngineLike) -> str:
        from chat.engine.request import Request, SamplingParams

        if TYPE_CHECKING:
            assert isinstance(engine, Engine)
        sampling = SamplingParams(do_sample=False, max_new_tokens=SENTENCE_TOKENS)
        question = ({"role": "user", "content": QUESTION},)
        (said,) = engine.generate([Request("try-out", messages=question, sampling=sampling)])
        if said.error is not None:
            raise LoadFailed("try_out_failed", str(said.error["message"]))
        if not said.token_ids:
            raise LoadFailed("try_out_failed", "it generated nothing")
        return said.text.strip()

    def release(self) -> None:
        gc.collect()
        if "torch" in sys.modules:
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        with contextlib.suppress(OSError, AttributeError):  # glibc: freed pages to the system
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    # -- the rows

    def tell(self, target: Target, phase: str) -> None:
        def write() -> None:
            if self._switch is None:
                self._switch = self._claimed(target)
            if self._switch is not None:
                ServingSwitch.objects.filter(pk=self._switch).update(status=phase, worker=self._me)

        _guarded(write)

    def _claimed(self, target: Target) -> int | None:
        """The row of a change to `target`; None when this is none (a start, or awake again)."""
        if self._name or (self._had is not None and self._had.key == target.key):
            return None
        waiting = ServingSwitch.objects.filter(
            status=ServingSwitch.Status.WAITING, checkpoint=target.key[0]
        ).first()
        if waiting is not None and ServingSwitch.objects.filter(
            pk=waiting.pk, status=ServingSwitch.Status.WAITING
        ).update(status=ServingSwitch.Status.LOADING, worker=self._me):
            return waiting.pk
        if self._had is None:
            return None
        previous = Checkpoint.objects.filter(pk=self._had.key[0]).first()
        created = ServingSwitch.objects.create(
            checkpoint_id=target.key[0],
            precision=target.key[3],
            previous=previous,
            previous_precision=self._had.key[3],
        )
        return created.pk

    def succeeded(self, target: Target, sentence: str, seconds: float) -> None:
        self._had = target
        switch, self._switch = self._switch, None
        logger.info("checkpoint %s said: %s", target.name, sentence)
        if switch is not None:
            logger.info("switch %s: %s is served after %.1f s", switch, target.name, seconds)
            _guarded(
                lambda: ServingSwitch.objects.filter(pk=switch).update(
                    status=ServingSwitch.Status.SUCCEEDED,
                    sentence=sentence.replace("\0", ""),
                    seconds=seconds,
                    finished_at=timezone.now(),
                )
            )

    def failed(self, target: Target, error: Exception) -> Target | None:
        number, self._switch = self._switch, None
        if number is None:
            return self._had if self._had is not None and self._had.key != target.key else None
        taken_back: list[Target | None] = [self._had]

        def write() -> None:
            switch = ServingSwitch.objects.select_related("previous").get(pk=number)
            self._end_as_failed(switch, error)
            back = _restore(switch)
            if back is not None:
                taken_back[0] = _target(back)

        _guarded(write)
        return taken_back[0]

    def _end_as_failed(self, switch: ServingSwitch, error: Exception) -> None:
        code = str(getattr(error, "code", "") or "loading_failed")
        logger.error(
            "switch %s: %s cannot be served (%s: %s); back to %s",
            switch.pk,
            switch.checkpoint,
            code,
            error,
            switch.previous,
        )
        switch.status, switch.finished_at = ServingSwitch.Status.FAILED, timezone.now()
        switch.error = {"code": code, "message": str(error), "type": "server_error", "param": None}
        switch.save(update_fields=["status", "finished_at", "error"])


@transaction.atomic
def _restore(switch: ServingSwitch) -> Checkpoint | None:
    """Makes what was before the wish again, unless somebody has chosen another meanwhile."""
    now = Checkpoint.objects.filter(is_default=True).first()
    previous = switch.previous
    if previous is None or now is None or now.pk != switch.checkpoint_id:
        return now
    if previous.precision != switch.previous_precision:
        previous.precision = switch.previous_precision
        previous.save(update_fields=["precision"])
    if previous.pk != now.pk:
        Checkpoint.objects.filter(pk=now.pk).update(is_default=False)
        Checkpoint.objects.filter(pk=previous.pk).update(is_default=True)
    return previous


def _target(row: Checkpoint) -> Target:
    seconds = (row.description.get("measured") or {}).get("seconds")
    key = (row.pk, row.fingerprint, row.path, row.precision)
    return Target(row.name, row.fingerprint, key, seconds)


def _checkpoint(target: Target) -> Checkpoint:
    close_old_connections()
    return Checkpoint.objects.get(pk=target.key[0])


def _bytes_needed(checkpoint: Checkpoint) -> int | None:
    """For chat, as estimated; None where its files say too little. Weights are packed once they are
    there, so what they take before counts.
    """
    if machine().device == "cpu" and checkpoint.precision != "int4":
        wanted = "float32"
    else:
        stored = str(checkpoint.description.get("dtype"))
        wanted = "float32" if stored == "float32" and not checkpoint.precision else "bfloat16"
    for estimate in estimates(checkpoint.description):
        if (estimate.use, estimate.precision) == ("chat", wanted):
            return estimate.bytes
    return None


def _check_room(checkpoint: Checkpoint) -> None:
    """LoadFailed where loading it would end in the process being killed."""
    needed = _bytes_needed(checkpoint)
    if needed is None:
        return
    for code, have in (("too_large", machine().bytes), ("memory_too_small", _free())):
        if needed > have:
            message = (
                f"{checkpoint.name} needs about {needed / 2**30:.1f} GiB, "
                f"{have / 2**30:.1f} GiB are {'there' if code == 'too_large' else 'free'}"
            )
            raise LoadFailed(code, message)


def _free() -> int:
    from chat.engine.capacity import free_memory
    from chat.engine.loading import default_device

    return free_memory(default_device())


def _taken(device: str) -> int:
    """Bytes: the process on a processor, the weights on cards."""
    import torch

    if device.startswith("cuda"):
        return sum(torch.cuda.memory_allocated(n) for n in range(torch.cuda.device_count()))
    return psutil.Process().memory_info().rss


def _guarded(write: Callable[[], object]) -> None:
    """A database that is away does not keep a model from being served."""
    close_old_connections()
    try:
        write()
    except DatabaseError:
        logger.exception("how the served model changes cannot be written down")
