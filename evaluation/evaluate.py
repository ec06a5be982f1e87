"""`python -m evaluation.evaluate RUN TOKEN`: the process that carries out one evaluation.

Every prediction is a row as soon as it is finished, so a process that is lost, or told to step aside, costs only what was in
flight. The process writes while it holds the run's token, and ends at once when it has been fenced off.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import django

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")
    django.setup()

import torch
from django.conf import settings
from django.db import connection
from django.db.models import F

from chat.engine.fingerprint import CheckpointInvalid
from chat.engine.loading import default_device, load
from chat.engine.request import AdapterRef, RequestRefused
from evaluation.comparison import update_differences
from evaluation.metrics import Scorer, average
from evaluation.models import EvaluationRun, Prediction
from evaluation.predict import Predicted, engine_for, messages_of, predict, reference_of
from portal import runs
from tuning import device_lock
from tuning.datasets import open_split

logger = logging.getLogger(__name__)

HEARTBEAT = 1.0  # seconds; also how soon a cancel is heard
SAVE_EVERY = 1.0  # seconds between writes of finished rows
ROWS_A_WRITE = 200
FENCED_OFF = 3  # exit code


class RunFailed(Exception):
    """The evaluation cannot be carried out; trying again would not help."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Stopped(Exception):
    """Somebody asked to stop while nothing was there yet that would be worth saving."""


class Heart:
    """Beats on a thread of its own, because loading or one slow step may take longer than the lease."""

    def __init__(self, run_id: int, token: str, total: int):
        self.run_id, self.token = run_id, token
        self.progress, self.total, self.phase = 0, total, "loading"
        self.cancelled, self.step_aside = threading.Event(), threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._ended.set()
        self._thread.join()
        self.beat()

    def _beat(self) -> None:
        try:
            while True:
                self.beat()
                if self._ended.wait(HEARTBEAT):
                    return
        finally:
            connection.close()

    @property
    def should_stop(self) -> bool:
        return self.cancelled.is_set() or self.step_aside.is_set()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM: step aside; SIGINT: cancel. At once while loading, between two engine steps later."""

        def stop(wish: threading.Event) -> None:
            wish.set()
            if self.phase != "predicting":
                raise Stopped

        wishes = {signal.SIGTERM: self.step_aside, signal.SIGINT: self.cancelled}
        before = {number: signal.signal(number, lambda *_, wish=wish: stop(wish)) for number, wish in wishes.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        if self.should_stop:
            raise Stopped

    def beat(self) -> None:
        try:
            told = runs.heartbeat(self.run_id, self.token, progress=self.progress, total=self.total, phase=self.phase)
        except runs.FencedOff:
            logger.warning("fenced off: another process holds the run")
            os._exit(FENCED_OFF)  # whatever the main thread is in the middle of, it must not write any more
        except Exception:  # the database may be away for a moment; the lease says for how long
            logger.exception("heartbeat failed")
            return
        if told is runs.Signal.CANCEL:
            self.cancelled.set()


def evaluate(run_id: int, token: str) -> None:
    """Carries the run out to its end, whichever that is."""
    run = EvaluationRun.objects.select_related("dataset_version", "checkpoint", "adapter").get(pk=run_id)
    fault, stopped = None, False
    with Heart(run_id, token, run.recipe["rows"]) as heart:
        try:
            with heart.listening():
                _predict_rows(run, heart)
        except Stopped:
            stopped = True
        except RunFailed as failure:
            fault = failure
        except torch.OutOfMemoryError as failure:
            fault = RunFailed("out_of_memory", f"The device has too little free memory: {failure}")
        except (runs.FencedOff, SystemExit, KeyboardInterrupt):
            raise
        except Exception as failure:
            traceback.print_exc()
            fault = RunFailed("unexpected", f"{type(failure).__name__}: {failure}")
    if fault is not None:
        runs.fail(run_id, token, fault.code, str(fault))
    elif stopped and heart.cancelled.is_set():
        runs.acknowledge_cancel(run_id, token)
    elif stopped:
        runs.step_aside(run_id, token)
    else:
        _conclude(run, token)


def _predict_rows(run: EvaluationRun, heart: Heart) -> None:
    """Predicts and saves the rows that have no prediction yet. Raises Stopped before the end, RunFailed when there is none."""
    recipe = run.recipe
    if "adapter" in recipe and run.adapter is None:
        raise RunFailed("adapter_deleted", f"The adapter “{recipe['adapter']}” has been deleted.")
    try:
        split = open_split(run.dataset_version, run.split)
    except FileNotFoundError as missing:
        raise RunFailed("dataset_missing", f"The dataset's files are gone: {missing.filename}") from missing
    done = set(run.predictions.values_list("row", flat=True))
    heart.progress = len(done)
    waiting = [row for row in range(min(recipe["rows"], len(split))) if row not in done]
    if not waiting:
        return
    device = settings.DEVICE or str(default_device())
    if device == "cpu":
        os.nice(5)  # chat comes first: its worker shares these processors
    with device_lock.hold(device, heart.check):
        _predict(run, heart, split, waiting, _loaded(run, device))
    if heart.progress < recipe["rows"]:
        raise Stopped


def _predict(run: EvaluationRun, heart: Heart, split, waiting: list[int], loaded) -> None:
    recipe = run.recipe
    lengths = recipe["max_source_length"], recipe["max_target_length"]
    engine = engine_for(loaded, *lengths, pre_seq_len=recipe.get("pre_seq_len", 0))
    adapter = None
    if run.adapter is not None:
        adapter = AdapterRef(name=run.adapter.sha256, folder=str(run.adapter.path))
    scorer = Scorer(settings.DATA_DIR / "cache")
    heart.check()
    heart.phase = "predicting"
    finished: list[Predicted] = []
    saved_at = time.monotonic()
    examples = ((row, messages_of(split[row]["prompt"], split[row]["history"])) for row in waiting)
    predictions = predict(
        engine,
        examples,
        adapter=adapter,
        decoding=recipe["decoding"],
        max_source_length=lengths[0],
        max_target_length=lengths[1],
        seed=recipe["seed"],
        should_stop=lambda: heart.should_stop,
    )

    def save() -> None:
        nonlocal saved_at
        if finished:
            _save(run, heart, split, finished, loaded.prompter, lengths, scorer)
            heart.progress += len(finished)
            finished.clear()
        saved_at = time.monotonic()

    try:
        for predicted in predictions:
            finished.append(predicted)
            if len(finished) >= ROWS_A_WRITE or time.monotonic() - saved_at > SAVE_EVERY:
                save()
    except RequestRefused as refusal:
        raise RunFailed(refusal.code, refusal.message) from refusal
    save()


def _loaded(run: EvaluationRun, device: str):
    try:
        loaded = load(run.checkpoint.path, device=device, quantization_bit=run.recipe["quantization_bit"])
    except (CheckpointInvalid, OSError) as fault:
        raise RunFailed("checkpoint_invalid", f"The checkpoint cannot be loaded: {fault}") from fault
    if loaded.fingerprint != run.recipe["checkpoint_fingerprint"]:
        raise RunFailed("checkpoint_changed", "The checkpoint's files are not those that the evaluation was made for.")
    return loaded


def _save(run, heart, split, finished: list[Predicted], prompter, lengths, scorer) -> None:
    """Scores rows and writes them, as long as the run is still ours."""
    rows, failed = [], 0
    for predicted in finished:
        example = split[predicted.row]
        text = predicted.text.replace("\0", "")  # PostgreSQL has no room for it
        reference = reference_of(prompter, example["prompt"], example["response"], *lengths).replace("\0", "")
        if predicted.error is not None:
            failed += 1
            logger.warning("row %d: %s", predicted.row, predicted.error["message"])
        rows.append(
            Prediction(
                run=run,
                row=predicted.row,
                prompt=example["prompt"].replace("\0", ""),
                reference=reference,
                text=text,
                scores=scorer.score(text, reference),
            )
        )
    heart.beat()
    Prediction.objects.bulk_create(rows, ignore_conflicts=True)
    if failed:
        EvaluationRun.objects.filter(pk=run.pk).update(failed_rows=F("failed_rows") + failed)


def _conclude(run: EvaluationRun, token: str) -> None:
    """Scores over all rows, then the terminal status, then what others derive from it."""
    run.refresh_from_db(fields=["failed_rows"])
    if run.failed_rows >= run.recipe["rows"]:
        runs.fail(run.pk, token, "all_rows_failed", "The model gave no answer to any row; the log names the reasons.")
        return
    scores = list(run.predictions.order_by("row").values_list("scores", flat=True))
    EvaluationRun.objects.filter(pk=run.pk, token=token).update(scores=average(scores))
    runs.succeed(run.pk, token)
    update_differences(run.pk)


if __name__ == "__main__":
    try:
        evaluate(int(sys.argv[1]), sys.argv[2])
    except runs.FencedOff:
        sys.exit(FENCED_OFF)
