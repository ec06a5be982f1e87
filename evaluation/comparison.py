"""Two evaluations of the same rows beside each other."""

from typing import Any

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from evaluation.intervals import difference
from evaluation.models import EvaluationRun
from portal.models import Run


def compare(run: EvaluationRun, other: EvaluationRun) -> dict[str, Any]:
    """{"rows", "scores", "other_scores", "difference"}: `run` minus `other` over the rows that both
    predicted.

    Raises ValidationError when they read different rows or either has no scores.
    """
    if run.scores is None or other.scores is None:
        raise ValidationError(_("Both evaluations must have ended with scores."), code="no_scores")
    if run.recipe["dataset"]["sha256"] != other.recipe["dataset"]["sha256"]:
        raise ValidationError(
            _("The two evaluations are of different rows."), code="different_rows"
        )
    ours = dict(run.predictions.values_list("row", "scores"))
    theirs = dict(other.predictions.values_list("row", "scores"))
    rows = sorted(ours.keys() & theirs.keys())
    return {
        "rows": len(rows),
        "scores": run.scores,
        "other_scores": other.scores,
        "difference": difference([ours[row] for row in rows], [theirs[row] for row in rows]),
    }


def update_differences(run_id: int) -> None:
    """Fills in `difference` of this run, and of the runs whose baseline it is, wherever both sides
    have succeeded now.
    """
    run = EvaluationRun.objects.select_related("baseline").get(pk=run_id)
    for tuned in [run, *run.compared.filter(status=Run.Status.SUCCEEDED)]:
        if tuned.baseline is not None and tuned.baseline.status == Run.Status.SUCCEEDED:
            told = compare(tuned, tuned.baseline)["difference"]
            EvaluationRun.objects.filter(pk=tuned.pk).update(difference=told)
