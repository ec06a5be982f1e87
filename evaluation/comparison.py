"""Evaluations of the same rows beside each other: any of them, whatever answered: the base, an
adapter, one of its earlier steps, another checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from evaluation.intervals import difference, holm
from evaluation.models import EvaluationRun
from evaluation.verdicts import of_metric
from portal.models import Run

MOST = 12  # runs beside one baseline: what a chart and a person can hold


def compare(run: EvaluationRun, other: EvaluationRun) -> dict[str, Any]:
    """{"rows", "scores", "other_scores", "difference", "verdicts", "other_references",
    "other_decoding"}: `run` minus `other` over the rows that both predicted.

    verdicts: evaluation.verdicts.of_metric by metric. other_references: rows whose references
    differ, because another tokenizer or limit cut them. Raises ValidationError when they read
    different rows or either has no scores.
    """
    (found,) = compare_all(other, [run])
    return found


def compare_all(baseline: EvaluationRun, runs: Sequence[EvaluationRun]) -> list[dict[str, Any]]:
    """`compare` of each of `runs` with one baseline. With several, their p-values are corrected
    metric by metric ("p_corrected" of the differences, Holm), and the verdicts follow those.
    """
    if len(runs) > MOST:
        raise ValidationError(
            _("At most %(most)s evaluations can be compared with one.") % {"most": MOST},
            code="too_many",
        )
    for run in runs:
        check_comparable(run, baseline)
    theirs = _rows(baseline)
    found = [_compared(run, _rows(run), baseline, theirs) for run in runs]
    _correct([each["difference"] for each in found])
    for each in found:
        each["verdicts"] = {
            metric: of_metric(metric, told, each["rows"], compared=len(runs))
            for metric, told in each["difference"].items()
        }
    return found


def check_comparable(run: EvaluationRun, other: EvaluationRun) -> None:
    """ValidationError when they read different rows or either has no scores."""
    if run.scores is None or other.scores is None:
        raise ValidationError(_("Both evaluations must have ended with scores."), code="no_scores")
    if _read(run) != _read(other):
        raise ValidationError(
            _("The two evaluations are of different rows."), code="different_rows"
        )


def _read(run: EvaluationRun) -> str | None:
    return run.recipe.get("dataset", {}).get("sha256")


def _rows(run: EvaluationRun) -> dict[int, tuple[dict, dict, str]]:
    """{row: (scores, counts, reference)}"""
    values = run.predictions.values_list("row", "scores", "counts", "reference")
    return {row: (scores, counts, reference) for row, scores, counts, reference in values}


def _compared(run: EvaluationRun, ours: dict, other: EvaluationRun, theirs: dict) -> dict[str, Any]:
    both = sorted(ours.keys() & theirs.keys())
    pairs = [(ours[row], theirs[row]) for row in both]
    told = difference(
        [mine[0] for mine, _theirs in pairs],
        [their[0] for _mine, their in pairs],
        [mine[1] for mine, _theirs in pairs],
        [their[1] for _mine, their in pairs],
    )
    return {
        "rows": len(both),
        "scores": run.scores,
        "other_scores": other.scores,
        "difference": told,
        "other_references": sum(mine[2] != their[2] for mine, their in pairs),
        "other_decoding": run.decoding != other.decoding,
    }


def _correct(differences: list[dict[str, dict]]) -> None:
    """Adds "p_corrected" where several runs are compared at once."""
    if len(differences) < 2:
        return
    for metric in {name for told in differences for name in told}:
        some = [told[metric] for told in differences if told.get(metric, {}).get("p") is not None]
        for told, corrected in zip(some, holm([each["p"] for each in some]), strict=True):
            told["p_corrected"] = corrected


def update_differences(run_id: int) -> None:
    """Fills in `difference` of this run, and of the runs whose baseline it is, wherever both sides
    have succeeded now.
    """
    run = EvaluationRun.objects.select_related("baseline").get(pk=run_id)
    for tuned in [run, *run.compared.filter(status=Run.Status.SUCCEEDED)]:
        if tuned.baseline is not None and tuned.baseline.status == Run.Status.SUCCEEDED:
            told = compare(tuned, tuned.baseline)["difference"]
            EvaluationRun.objects.filter(pk=tuned.pk).update(difference=told)


def comparable(user, run: EvaluationRun):
    """Ended evaluations of the same rows that `user` may see, `run` not among them."""
    return (
        EvaluationRun.objects.visible_to(user)
        .filter(
            status=Run.Status.SUCCEEDED,
            scores__isnull=False,
            recipe__dataset__sha256=_read(run),
        )
        .exclude(pk=run.pk)
    )
