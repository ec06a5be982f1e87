"""Scores drawn: positions in percent of an axis, for the SVG of the templates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from django.core.cache import cache
from django.db.models import Count, IntegerField
from django.db.models.functions import Cast, Floor, Length, Trim

from evaluation import reading
from evaluation.intervals import ROUGE_L
from evaluation.metrics import METRICS
from evaluation.models import EvaluationRun
from evaluation.verdicts import label_of

BARS = 20  # of a distribution


def score_chart(sides: Sequence[EvaluationRun], differences: dict | None = None) -> dict | None:
    """The original's four of one or two runs: {"lines": [{"name", "marks", "difference"}],
    "ticks"}, each mark with "x", "from" and "width" on an axis from 0 to a round number above the
    largest interval. None without scores.
    """
    sides = [side for side in sides if side is not None and side.scores]
    if not sides:
        return None
    shown = [metric for metric in METRICS if all(metric in side.scores for side in sides)]
    axis = Axis(max(_end(side.scores[metric]) for side in sides for metric in shown))
    return {
        "lines": [
            {
                "name": label_of(metric),
                "marks": [axis.mark(side.scores[metric], is_tuned(side)) for side in sides],
                "difference": (differences or {}).get(metric),
            }
            for metric in shown
        ],
        "ticks": axis.ticks,
    }


def metric_chart(runs: Sequence[EvaluationRun], metric: str) -> dict | None:
    """One metric of many runs: {"marks", "ticks"}, a mark a run; None where nobody has it."""
    having = [run for run in runs if run.scores and metric in run.scores]
    if not having:
        return None
    axis = Axis(max(_end(run.scores[metric]) for run in having))
    marks = [axis.mark(run.scores[metric], is_tuned(run)) | {"run": run} for run in having]
    return {"marks": marks, "ticks": axis.ticks}


def is_tuned(run: EvaluationRun) -> bool:
    return run.adapter_id is not None or run.adapter_name is not None


def _end(score: dict) -> float:
    return score["value"] if score.get("high") is None else score["high"]


class Axis:
    """From 0 to a round number; `ticks`: (position in percent, figure)."""

    def __init__(self, highest: float):
        highest = max(highest, 0.01)
        size = 10.0 ** math.floor(math.log10(highest / 5))
        step = next(size * nice for nice in (1, 2, 5, 10) if highest / (size * nice) <= 5)
        count = math.floor(highest / step) + 1
        self.top = step * count
        self.ticks = [(100 * number / count, f"{step * number:g}") for number in range(count + 1)]

    def mark(self, score: dict, tuned: bool) -> dict:
        low = score["value"] if score.get("low") is None else score["low"]
        return {
            **score,
            "tuned": tuned,
            "x": 100 * score["value"] / self.top,
            "from": 100 * low / self.top,
            "width": max(0.4, 100 * (_end(score) - low) / self.top),
        }


def distributions(run: EvaluationRun) -> list[dict]:
    """How ROUGE-L and the answers' lengths spread over the rows, of the base and the run:
    [{"name", "sides": [{"tuned", "bars": [{"x", "width", "height", "from", "to", "rows"}]}],
    "ends"}]. Of a run that has ended it is kept, for its rows do not change.
    """
    sides = [side for side in (run.baseline, run) if side is not None and side.scores]
    counted = [_kept(side) for side in sides]
    return [
        _histogram(name, sides, [each[name] for each in counted], least_width)
        for name, least_width in (("score", 5), ("length", 1))
        if any(each[name] for each in counted)
    ]


def _kept(run: EvaluationRun) -> dict[str, dict[int, int]]:
    key = f"evaluation-distribution-{run.pk}-{run.key}-{run.progress}"
    return cache.get_or_set(key, lambda: _counted(run), 3600)


def _counted(run: EvaluationRun) -> dict[str, dict[int, int]]:
    """{"score": {floor of ROUGE-L: rows}, "length": {characters: rows}}, by the database."""
    floor = Cast(Floor(reading.value_of(ROUGE_L)), IntegerField())
    by_score = run.predictions.order_by().values(at=floor).annotate(rows=Count("pk"))
    by_length = (
        run.predictions.order_by().values(at=Length(Trim("text"))).annotate(rows=Count("pk"))
    )
    return {
        name: {each["at"]: each["rows"] for each in found if each["at"] is not None}
        for name, found in (("score", by_score), ("length", by_length))
    }


def _histogram(
    name: str, sides: Sequence[EvaluationRun], counted: list[dict[int, int]], least_width: int
) -> dict:
    end = 100 if name == "score" else max((max(each, default=0) for each in counted), default=0) + 1
    width = max(least_width, math.ceil(end / BARS))
    count = math.ceil(end / width)
    binned = []
    for each in counted:
        bars = [0] * count
        for at, rows in each.items():
            bars[min(at // width, count - 1)] += rows
        binned.append(bars)
    tallest = max(max(bars) for bars in binned) or 1
    return {
        "name": name,
        "sides": [
            {
                "tuned": is_tuned(side),
                "told": "; ".join(
                    f"{number * width}–{(number + 1) * width}: {rows}"
                    for number, rows in enumerate(bars)
                    if rows
                ),
                "bars": [
                    {
                        "x": 100 * number / count,
                        "width": 100 / count,
                        "height": 100 * rows / tallest,
                        "y": 100 - 100 * rows / tallest,
                        "from": number * width,
                        "to": (number + 1) * width,
                        "rows": rows,
                    }
                    for number, rows in enumerate(bars)
                ],
            }
            for side, bars in zip(sides, binned, strict=True)
        ],
        "ends": (0, count * width),
    }
