"""The trainer process: `python -m tuning.train RUN TOKEN`, started by the queue's task for a run that it has claimed.

The main thread loads and trains. A second thread writes to the database about once a second: the lease, progress and metrics,
and reads the wish to cancel. Whoever loses the fencing token ends at once.

SIGTERM saves a checkpoint and puts the run back into the queue; cancel saves one and ends the run, which may be resumed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import django

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")
    django.setup()

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import DatabaseError, close_old_connections, connection, transaction
from django.utils import timezone

from chat.engine.fingerprint import CheckpointInvalid
from chat.registry import publish_adapter
from portal import runs
from portal.processes import run_folder
from tuning import device_lock
from tuning.datasets import open_split
from tuning.models import TuningMetric, TuningRun

BEAT = 1.0  # seconds between two writes
STALL = 1800.0  # seconds without a step, a phase or a loaded model after which the process counts as hung
EXIT_FENCED_OFF, EXIT_NO_DATABASE = 3, 4
CANCEL, STEP_ASIDE = "cancel", "step aside"

Say = Callable[[str], None]


class Asked(Exception):
    """Somebody asked to stop before training began; `wish` is CANCEL or STEP_ASIDE."""

    def __init__(self, wish: str):
        super().__init__(wish)
        self.wish = wish


class Heart(threading.Thread):
    """Keeps the run's lease and carries what the main thread tells to the database. The only writer while it beats."""

    def __init__(self, run_id: int, token: str, say: Say):
        super().__init__(name="heart", daemon=True)
        self._run_id, self._token, self._say = run_id, token, say
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._writing = threading.Lock()  # one write at a time, the oldest words first
        self._progress: dict = {}
        self._measured: dict = {}
        self._metrics: list[TuningMetric] = []
        self._alive = self._written = time.monotonic()
        self.wish: str | None = None

    def tell(self, *, metric: TuningMetric | None = None, measured: dict | None = None, **progress) -> None:
        """From the main thread; also its sign of life."""
        with self._lock:
            self._progress |= progress
            self._measured |= measured or {}
            self._metrics += [metric] if metric else []
            self._alive = time.monotonic()

    def check(self) -> None:
        """Raises Asked when somebody wants the run to stop."""
        if self.wish:
            raise Asked(self.wish)

    def run(self) -> None:
        while not self._ended.wait(BEAT):
            self._beat()
        connection.close()

    def flush(self) -> None:
        """Writes what has been told, before a checkpoint makes sure that it is never told again."""
        self._beat()

    def end(self) -> None:
        """Stops beating; everything told has been written then. The main thread may write after it."""
        self._ended.set()
        self.join()
        self._beat()

    def _beat(self) -> None:
        with self._writing:
            self._write()

    def _write(self) -> None:
        with self._lock:
            if time.monotonic() - self._alive > STALL:
                self._say(f"nothing has happened for {STALL:.0f} s: giving up the lease")
                os._exit(1)
            progress, measured, metrics = self._progress, self._measured, self._metrics
            self._progress, self._measured, self._metrics = {}, {}, []
        try:
            close_old_connections()
            with transaction.atomic():
                wish = runs.heartbeat(self._run_id, self._token, **progress)
                if measured:
                    TuningRun.objects.filter(pk=self._run_id).update(**measured)
                if metrics:  # a resumed run logs some steps again, with the same values
                    TuningMetric.objects.bulk_create(
                        metrics, update_conflicts=True, unique_fields=["run", "step"],
                        update_fields=["loss", "learning_rate", "samples_per_second"],
                    )  # fmt: skip
        except runs.FencedOff:
            self._say("another process holds this run now: stopping")
            os._exit(EXIT_FENCED_OFF)
        except DatabaseError as error:
            self._say(f"the database does not answer ({error}); trying again")
            with self._lock:
                self._progress, self._measured = progress | self._progress, measured | self._measured
                self._metrics = metrics + self._metrics
            if time.monotonic() - self._written > runs.LEASE.total_seconds():
                os._exit(EXIT_NO_DATABASE)
            return
        self._written = time.monotonic()
        if wish is runs.Signal.CANCEL:
            self.wish = CANCEL


def carry_out(run_id: int, token: str, say: Say) -> str:
    """Trains a claimed run to its end and returns its status; the run's row says the rest.

    Raises FencedOff when another process took the run over at its very end.
    """
    heart = Heart(run_id, token, say)
    busy = threading.Event()  # training: a stop waits for the step's end

    def stop(wish: str) -> None:
        heart.wish = heart.wish or wish
        if not busy.is_set():
            raise Asked(heart.wish)

    error: tuple[str, str] | None = None
    wish = None
    heart.start()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGTERM, lambda *_: stop(STEP_ASIDE))
        signal.signal(signal.SIGINT, lambda *_: stop(CANCEL))
        _train(
            TuningRun.objects.select_related("owner", "checkpoint", "dataset_version").get(pk=run_id), heart, busy, say
        )
    except Asked as asked:
        wish = asked.wish
    except Exception as fault:
        error = _told(fault)
        say(f"failed: {error[1]}" if error[0] != "unexpected" else traceback.format_exc().rstrip())
    for number in before:  # what is left takes no time, and must not be cut in two
        signal.signal(number, signal.SIG_IGN)
    heart.end()
    close_old_connections()
    try:
        if error is not None:
            runs.fail(run_id, token, *error)
        elif wish == CANCEL:
            runs.acknowledge_cancel(run_id, token)
        elif wish == STEP_ASIDE:
            runs.step_aside(run_id, token)
        else:
            runs.succeed(run_id, token)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status = TuningRun.objects.only("status").get(pk=run_id).status
    say({"queued": "stepped aside: the run goes on from its checkpoint later"}.get(status, status))
    if error is None and wish is None:
        from tuning.ptuning import checkpoints

        checkpoints.delete_all(TuningRun(pk=run_id).checkpoint_folder)  # the adapter is all that is needed now
    return status


def _train(run: TuningRun, heart: Heart, busy: threading.Event, say: Say) -> None:
    """Loads, trains and publishes. Returns when the adapter is there."""
    heart.tell(phase="loading")
    import torch
    from transformers.utils.logging import disable_progress_bar

    from chat.engine import adapters, loading
    from tuning.ptuning.recipe import Recipe
    from tuning.ptuning.trainer import Progress, Stopped, Trainer

    disable_progress_bar()  # the log is a file
    recipe = Recipe.from_dict(run.recipe)
    device = settings.DEVICE or str(loading.default_device())
    if device == "cpu":
        os.nice(5)  # chat comes first: its worker shares these processors
    say(
        f"run {run.pk}, attempt {run.attempt}: {run.checkpoint} on {device}, {run.recipe['dataset']['rows']} examples, "
        f"{recipe.max_steps} steps of {recipe.samples_per_step}"
    )

    def waiting() -> None:
        heart.tell(phase="waiting")
        heart.check()

    with device_lock.hold(device, waiting):
        heart.tell(phase="loading")
        dtype = None if recipe.precision == "auto" else getattr(torch, recipe.precision)
        loaded = loading.load(run.checkpoint.path, device=device, dtype=dtype, quantization_bit=recipe.quantization_bit)
        if loaded.fingerprint != run.recipe["checkpoint"]["fingerprint"]:
            raise _Misfit("checkpoint_changed", "the checkpoint's files are not those that the run was planned with")
        heart.check()
        with open_split(run.dataset_version, run.recipe["dataset"]["split"]) as examples:

            def report(progress: Progress) -> bool:
                metric = None
                if progress.logged is not None:
                    say(_line(progress))
                    metric = TuningMetric(
                        run_id=run.pk, step=progress.step, loss=progress.logged,
                        learning_rate=progress.learning_rate, samples_per_second=progress.samples_per_second,
                    )  # fmt: skip
                measured = (
                    {} if metric is None else {"loss": metric.loss, "samples_per_second": metric.samples_per_second}
                )
                heart.tell(progress=progress.step, phase="training", metric=metric, measured=measured)
                if progress.step % recipe.save_steps == 0:
                    heart.flush()
                return heart.wish is not None

            trainer = Trainer(loaded, recipe, examples, run.checkpoint_folder, report)
            say(f"{trainer.trainable_parameters:,} parameters are trained; the base model is frozen")
            if trainer.step:
                say(f"going on after step {trainer.step}")
            measured = {"trainable_parameters": trainer.trainable_parameters}
            heart.tell(phase="training", progress=trainer.step, total=recipe.max_steps, measured=measured)
            busy.set()
            try:
                prefix = trainer.train()
            except Stopped as stopped:
                say(f"stopped after step {stopped.step}, checkpoint saved")
                raise Asked(heart.wish or STEP_ASIDE) from None
        heart.tell(phase="saving")
        prefix.metadata |= {"run": run.pk, "name": run.name, "checkpoint": run.checkpoint.name}
        folder = run_folder(run.pk) / "adapter"
        adapters.save(prefix, folder)
        adapter = publish_adapter(
            folder, name=run.name, checkpoint=run.checkpoint, owner=run.owner, run=run, step=recipe.max_steps
        )
        say(f"adapter “{adapter.name}”: {adapter.sha256}")


class _Misfit(Exception):
    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def _told(fault: Exception) -> tuple[str, str]:
    """(code, message) for the run's row."""
    if isinstance(fault, ValidationError):
        return "invalid", "; ".join(fault.messages)
    if isinstance(fault, CheckpointInvalid):
        return "checkpoint_invalid", str(fault)
    if isinstance(fault, FileNotFoundError):
        return "file_missing", f"{fault.strerror}: {fault.filename}"
    if type(fault).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return "out_of_memory", str(fault)
    code = getattr(fault, "code", None)
    if isinstance(code, str):
        return code, str(fault)
    return "unexpected", f"{type(fault).__name__}: {fault}"


def _line(progress) -> str:
    """One logged step, for the run's log."""
    speed = progress.samples_per_second
    return (
        f"step {progress.step}/{progress.max_steps}  loss {progress.logged:.4f}  lr {progress.learning_rate:.3e}  "
        f"{speed:.1f} examples/s"
    )


def stamped(line: str) -> str:
    return f"{timezone.localtime():%Y-%m-%d %H:%M:%S}  {line}"


def main(run_id: str, token: str) -> None:
    carry_out(int(run_id), token, lambda line: print(stamped(line), flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
