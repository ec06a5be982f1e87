"""The page that puts any evaluations of the same rows beside one of them."""

from urllib.parse import urlencode

from django.core.exceptions import ValidationError
from django.http import Http404
from django.shortcuts import render
from django.views.decorators.http import require_GET

from evaluation import charts
from evaluation.comparison import MOST, comparable, compare_all
from evaluation.intervals import ROUGE_L
from evaluation.metrics import METRICS, in_order
from evaluation.models import EvaluationRun
from evaluation.verdicts import LEVEL, few_rows, interval, label_of, said
from portal.access import get_visible
from portal.numbers import whole_number
from tuning.models import Dataset

CHOICES = 50  # evaluations, and datasets, that are offered
LISTED = 1000  # newest evaluations of a dataset that a leaderboard looks at


@require_GET
def compare(request):
    """`?baseline=ID&run=ID&run=ID…`; without a baseline it is the bare checkpoint's among them, the
    first run's own, or the last of them.
    """
    found = EvaluationRun.objects.select_related(
        "owner", "adapter", "checkpoint", "dataset_version__dataset"
    )
    numbers = [whole_number(text) for text in request.GET.getlist("run")][: MOST + 1]
    if None in numbers or not (numbers or request.GET.get("baseline")):
        raise Http404
    runs = [get_visible(found, request.user, pk=pk) for pk in dict.fromkeys(numbers)]
    baseline = _baseline(request, found, runs)
    runs = [run for run in runs if run.pk != baseline.pk]
    context = {
        "baseline": baseline,
        "runs": runs,
        "chosen": [run.pk for run in runs],
        "others": list(
            comparable(request.user, baseline).select_related("adapter", "checkpoint")[:CHOICES]
        ),
        "most": MOST,
    }
    try:
        compared = compare_all(baseline, runs)
    except ValidationError as problem:
        context["problem"] = problem.messages[0]
        return render(request, "evaluation/comparison.html", context)
    if runs:
        context |= _told(baseline, runs, compared)
    return render(request, "evaluation/comparison.html", context)


def _baseline(request, found, runs) -> EvaluationRun:
    if request.GET.get("baseline"):
        return get_visible(found, request.user, pk=request.GET["baseline"])
    bare = next((run for run in runs if not charts.is_tuned(run)), None)
    if bare is not None:
        return bare
    # whoever may see the tuned side may see the base beside it
    own = found.filter(pk=runs[0].baseline_id).first()
    return own or runs[-1]


def _told(baseline, runs, compared) -> dict:
    everybody = [baseline, *runs]
    metrics = in_order([name for each in compared for name in each["difference"]])
    metrics = list(dict.fromkeys(metrics))
    lines = []
    for metric in metrics:
        cells = []
        for run, each in zip(runs, compared, strict=True):
            told = each["difference"].get(metric)
            cells.append(
                {
                    "run": run,
                    "value": run.scores.get(metric, {}).get("value"),
                    "told": told and said(told["value"], signed=True),
                    "interval": told and interval(told),
                    "verdict": each["verdicts"].get(metric),
                    "p": told and told.get("p_corrected", told.get("p")),
                }
            )
        lines.append(
            {
                "metric": metric,
                "label": label_of(metric),
                "headline": metric in METRICS,
                "baseline": baseline.scores.get(metric, {}).get("value"),
                "cells": cells,
            }
        )
    rows = min(each["rows"] for each in compared)
    return {
        "lines": lines,
        "rows": rows,
        "few": few_rows(rows),
        "level": LEVEL,
        "corrected": len(runs) > 1,
        "charts": [
            {"label": label_of(metric), **chart}
            for metric in (ROUGE_L, "bleu-4")
            if (chart := charts.metric_chart(everybody, metric))
        ],
        "other_references": max(each["other_references"] for each in compared),
        "other_decoding": any(each["other_decoding"] for each in compared),
        "headline_sentences": [
            {"run": run, "verdict": each["verdicts"].get(ROUGE_L)}
            for run, each in zip(runs, compared, strict=True)
        ],
    }


@require_GET
def leaderboard(request):
    """`?dataset=ID`: for each set of rows of a dataset the newest evaluation of every model, best
    ROUGE-L first.
    """
    datasets = Dataset.objects.visible_to(request.user).filter(
        versions__evaluation_runs__scores__isnull=False
    )
    datasets = list(datasets.distinct()[:CHOICES])
    wanted = whole_number(request.GET.get("dataset"))
    chosen = next((each for each in datasets if each.pk == wanted), None)
    if request.GET.get("dataset") and chosen is None:
        raise Http404
    chosen = chosen or next(iter(datasets), None)
    boards = _boards(request.user, chosen) if chosen else []
    context = {"datasets": datasets, "chosen": chosen, "boards": boards}
    return render(request, "evaluation/leaderboard.html", context)


def _boards(user, dataset) -> list[dict]:
    """One for each (version, split, decoding), the newest first: scores of other rows or another
    decoding do not stand in one list.
    """
    runs = (
        EvaluationRun.objects.visible_to(user)
        .filter(dataset_version__dataset=dataset, scores__isnull=False, status="succeeded")
        .select_related("owner", "adapter", "checkpoint", "dataset_version__dataset")
        .defer("general")[:LISTED]
    )
    boards: dict[tuple, dict[tuple, EvaluationRun]] = {}
    for run in runs:  # the newest first
        rows = run.recipe.get("rows", run.total)
        board = boards.setdefault((run.dataset_version, run.split, run.decoding, rows), {})
        board.setdefault((run.checkpoint_id, run.adapter_id, run.adapter_name), run)
    found = []
    for (version, split, _decoding, rows), board in boards.items():
        ranked = sorted(
            board.values(), key=lambda run: -run.scores.get(ROUGE_L, {}).get("value", 0.0)
        )
        chart = charts.metric_chart(ranked, ROUGE_L)
        if chart:
            found.append(
                {
                    "version": version,
                    "split": split,
                    "decoding": ranked[0].get_decoding_display(),
                    "rows": rows,
                    "few": few_rows(rows),
                    "runs": ranked,
                    "query": urlencode([("run", run.pk) for run in ranked[:MOST]]),
                    "chart": {"label": label_of(ROUGE_L), **chart},
                }
            )
    return found
