"""`python -m evaluation.evaluate RUN TOKEN`: the process that carries out one evaluation.

Every prediction is a row about a second after it is finished, so a process that is lost, or asked
to stop (portal/runs/heartbeat.py), costs only what was in flight.
"""

from __future__ import annotations

import os
import sys
from functools import partial

import django

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")
    django.setup()

from django.conf import settings
from django.db.models import F

from chat.checkpoints.describe import CheckpointInvalid
from chat.engine.loading import Loaded, default_device, load
from chat.engine.request import AdapterRef
from evaluation.comparison import update_differences
from evaluation.metrics import Scorer, average
from evaluation.models import EvaluationRun, Prediction
from evaluation.predict import Predicted, engine_for, messages_of, predict, reference_of
from portal.models import Run
from portal.runs import device_lock, heartbeat
from portal.runs.heartbeat import STEP_ASIDE, Asked, Heart, RunFailed, Say
from tuning.datasets.store import Split, open_split


def carry_out(run_id: int, token: str, say: Say) -> str:
    """Carries a claimed run out to its end, whichever that is, and returns its status."""
    run = EvaluationRun.objects.select_related("dataset_version", "checkpoint", "adapter").get(
        pk=run_id
    )
    status = heartbeat.carry_out(run_id, token, lambda heart: _evaluate(run, heart, say), say)
    if status == Run.Status.SUCCEEDED:
        update_differences(run_id)
    return status


def _evaluate(run: EvaluationRun, heart: Heart, say: Say) -> None:
    """Predicts and saves the rows that have no prediction yet, then scores all of them."""
    recipe = run.recipe
    heart.tell(phase="loading", total=recipe["rows"])
    if "adapter" in recipe and run.adapter is None:
        raise RunFailed("adapter_deleted", f"The adapter “{recipe['adapter']}” has been deleted.")
    try:
        split = open_split(run.dataset_version, run.split)
    except FileNotFoundError as missing:
        raise RunFailed(
            "dataset_missing", f"The dataset's files are gone: {missing.filename}"
        ) from missing
    with split:
        done = set(run.predictions.values_list("row", flat=True))
        waiting = [row for row in range(min(recipe["rows"], len(split))) if row not in done]
        heart.tell(progress=len(done))
        if waiting:
            device = settings.DEVICE or str(default_device())
            model = " + ".join(recipe[part] for part in ("checkpoint", "adapter") if part in recipe)
            say(
                f"run {run.pk}, attempt {run.attempt}: {model} on {device}, {len(waiting)} rows, "
                f"{recipe['decoding']}"
            )
            if device == "cpu":
                os.nice(5)  # chat comes first: its worker shares these processors
            with device_lock.hold(device, heart.wait):
                heart.tell(phase="loading")
                _predict(run, heart, split, waiting, _loaded(run, device), say)
    heart.flush()
    scores = _scores(run)
    say("  ".join(f"{metric} {score['value']:.2f}" for metric, score in scores.items()))
    heart.tell(lambda: EvaluationRun.objects.filter(pk=run.pk).update(scores=scores))


def _predict(
    run: EvaluationRun, heart: Heart, split: Split, waiting: list[int], loaded: Loaded, say: Say
) -> None:
    """Raises Asked before the end when somebody wants the run to stop."""
    recipe = run.recipe
    lengths = recipe["max_source_length"], recipe["max_target_length"]
    engine = engine_for(loaded, *lengths, pre_seq_len=recipe.get("pre_seq_len", 0))
    adapter = None
    if run.adapter is not None:
        adapter = AdapterRef(name=run.adapter.sha256, folder=str(run.adapter.path))
    scorer = Scorer(settings.DATA_DIR / "cache")
    heart.check()
    heart.patient = True
    heart.tell(phase="predicting")
    examples = ((row, messages_of(split[row]["prompt"], split[row]["history"])) for row in waiting)
    predictions = predict(
        engine,
        examples,
        adapter=adapter,
        decoding=recipe["decoding"],
        max_source_length=lengths[0],
        max_target_length=lengths[1],
        seed=recipe["seed"],
        should_stop=lambda: heart.wish is not None,
    )
    finished = recipe["rows"] - len(waiting)
    for predicted in predictions:
        if predicted.error is not None:
            say(f"row {predicted.row}: {predicted.error['message']}")
        finished += 1
        prediction = _prediction(
            run, predicted, split[predicted.row], loaded.prompter, lengths, scorer
        )
        heart.tell(
            partial(_write, prediction, failed=predicted.error is not None), progress=finished
        )
    if finished < recipe["rows"]:
        raise Asked(heart.wish or STEP_ASIDE)


def _loaded(run: EvaluationRun, device: str) -> Loaded:
    try:
        loaded = load(
            run.checkpoint.path, device=device, quantization_bit=run.recipe["quantization_bit"]
        )
    except (CheckpointInvalid, OSError) as fault:
        raise RunFailed(
            "checkpoint_invalid", f"The checkpoint cannot be loaded: {fault}"
        ) from fault
    if loaded.fingerprint != run.recipe["checkpoint_fingerprint"]:
        raise RunFailed(
            "checkpoint_changed",
            "The checkpoint's files are not those that the evaluation was made for.",
        )
    return loaded


def _prediction(
    run, predicted: Predicted, example: dict, prompter, lengths, scorer: Scorer
) -> Prediction:
    """A finished row with its scores. NUL is taken out: PostgreSQL has no room for it."""
    text = predicted.text.replace("\0", "")
    reference = reference_of(prompter, example["prompt"], example["response"], *lengths).replace(
        "\0", ""
    )
    return Prediction(
        run=run,
        row=predicted.row,
        prompt=example["prompt"].replace("\0", ""),
        reference=reference,
        text=text,
        scores=scorer.score(text, reference),
    )


def _write(prediction: Prediction, failed: bool) -> None:
    Prediction.objects.bulk_create([prediction], ignore_conflicts=True)
    if failed:
        EvaluationRun.objects.filter(pk=prediction.run_id).update(failed_rows=F("failed_rows") + 1)


def _scores(run: EvaluationRun) -> dict:
    """Over all rows."""
    run.refresh_from_db(fields=["failed_rows"])
    if run.failed_rows >= run.recipe["rows"]:
        raise RunFailed(
            "all_rows_failed", "The model gave no answer to any row; the log names the reasons."
        )
    return average(list(run.predictions.order_by("row").values_list("scores", flat=True)))


if __name__ == "__main__":
    carry_out(int(sys.argv[1]), sys.argv[2], heartbeat.log_line)
