"""Scores counted anew from stored predictions, for metrics that came later: no model is asked."""

from __future__ import annotations

from django.conf import settings
from django.db import transaction

from evaluation.comparison import update_differences
from evaluation.models import EvaluationRun, Prediction

ROWS_AT_ONCE = 500


def score_again(run: EvaluationRun) -> dict:
    """Scores every stored prediction of an ended run by all metrics that texts suffice for, and the
    run by them; returns the run's new scores. What a model measured (perplexity) is kept.
    """
    from evaluation.intervals import average
    from evaluation.metrics import measured
    from evaluation.metrics.original import Scorer

    scorer = Scorer(settings.DATA_DIR / "cache")
    scores, counts = [], []
    some: list[Prediction] = []
    for prediction in run.predictions.order_by("row").iterator(ROWS_AT_ONCE):
        found = measured(scorer, prediction.text, prediction.reference)
        prediction.scores = {**prediction.scores, **found.scores}
        prediction.counts = {**prediction.counts, **found.counts}
        scores.append(prediction.scores)
        counts.append(prediction.counts)
        some.append(prediction)
        if len(some) == ROWS_AT_ONCE:
            _write(some)
            some = []
    _write(some)
    run.scores = average(scores, counts)
    EvaluationRun.objects.filter(pk=run.pk).update(scores=run.scores)
    update_differences(run.pk)
    return run.scores


@transaction.atomic
def _write(predictions: list[Prediction]) -> None:
    Prediction.objects.bulk_update(predictions, ["scores", "counts"])
