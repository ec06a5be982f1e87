"""Rows to numbers with 95 % intervals, of one evaluation or of the difference between two. Pure:
numpy alone.

What is measured of a row is evaluation/metrics: `scores`, a value by metric, and `counts`, figures
by metric for those that are combined over all rows (sacreBLEU, perplexity). A metric that one row
lacks is left out: no number is made up for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from evaluation.metrics import METRICS, Metric, in_order, known

__all__ = ["FEW_ROWS", "METRICS", "RESAMPLES", "ROUGE_L", "average", "difference", "holm"]

ROUGE_L = "rouge-l"
RESAMPLES = 2000
FEW_ROWS = 30  # below, percentile intervals are narrower than they say
_DRAWN_AT_ONCE = 2_000_000  # rows; bounds the memory of large datasets

Scores = Sequence[dict[str, float]]
Counts = Sequence[dict[str, list[float]]]
Interval = dict[str, Any]


def average(scores: Scores, counts: Counts | None = None, *, seed: int = 0) -> dict[str, Interval]:
    """{"rouge-1": {"value", "low", "high"}, ...}: the plain mean over the rows, as the original
    reports it (or what the metric makes of all rows), and its 95 % interval.

    The interval is the percentile bootstrap over rows: how far the value would move on another draw
    of as many rows. low and high are None for one row, which says nothing about others.
    """
    table = _Table(scores, counts)
    found, rows = {}, len(scores)
    drawn = _drawn([table], rows, seed) if rows > 1 else None
    for metric in table.metrics:
        values = drawn[0][metric] if drawn else None
        found[metric] = _interval(table.value(metric), values)
    return found


def difference(
    scores: Scores,
    baseline: Scores,
    counts: Counts | None = None,
    baseline_counts: Counts | None = None,
    *,
    seed: int = 0,
) -> dict[str, Interval]:
    """{"rouge-1": {"value", "low", "high", "p"}, ...}: `scores` minus `baseline` on the same rows
    in the same order, for the metrics that both have.

    The rows are resampled in pairs: how hard a row is cancels out, so the interval is much narrower
    than those of the two values suggest. A difference whose interval holds 0 may be chance. p: how
    often the resampled difference lies on the other side of 0, doubled (two-sided); None for one
    row.
    """
    if len(scores) != len(baseline):
        raise ValueError(
            f"scores of {len(scores)} rows cannot be paired with scores of {len(baseline)} rows"
        )
    ours, theirs = _Table(scores, counts), _Table(baseline, baseline_counts)
    found, rows = {}, len(scores)
    drawn = _drawn([ours, theirs], rows, seed) if rows > 1 else None
    for metric in ours.metrics:
        if metric not in theirs.metrics:
            continue
        values = drawn[0][metric] - drawn[1][metric] if drawn else None
        told = _interval(ours.value(metric) - theirs.value(metric), values)
        found[metric] = {**told, "p": None if values is None else _two_sided(values)}
    return found


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of several comparisons, corrected so that the chance of a single false alarm among
    all of them stays what it was for one (Holm 1979, step-down).
    """
    adjusted = [1.0] * len(ps)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda at: ps[at])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = round(highest, 6)
    return adjusted


class _Table:
    """The rows of one evaluation as an array: for each metric the columns that are summed."""

    def __init__(self, scores: Scores, counts: Counts | None):
        self.rows = len(scores)
        parts, self._columns, width = [], {}, 0
        names = set(scores[0]) if scores else set()
        if counts and len(counts) == len(scores):
            names |= set(counts[0])
        for name in in_order(list(names)):
            values = _values(known().get(name), name, scores, counts)
            if values is None:
                continue
            self._columns[name] = slice(width, width + values.shape[1])
            width += values.shape[1]
            parts.append(values)
        self.array = np.hstack(parts) if parts else np.zeros((self.rows, 0))

    @property
    def metrics(self) -> list[str]:
        return list(self._columns)

    def combined(self, metric: str, sums: np.ndarray) -> np.ndarray:
        """sums [..., columns] over as many rows as there are -> the metric's values [...]."""
        own = sums[..., self._columns[metric]]
        rule = known().get(metric)
        if rule is not None and rule.combine is not None:
            return rule.combine(own)
        return own[..., 0] / self.rows

    def value(self, metric: str) -> float:
        return float(self.combined(metric, self.array.sum(axis=0)))


def _values(
    rule: Metric | None, name: str, scores: Scores, counts: Counts | None
) -> np.ndarray | None:
    """[rows, columns], or None where a row lacks the metric."""
    rows: list[Any]
    if rule is not None and rule.is_over_all_rows:
        rows = [row.get(name) for row in counts or ()]
        if len(rows) != len(scores):
            return None
    else:
        rows = [None if row.get(name) is None else [row[name]] for row in scores]
    return None if None in rows else np.array(rows, dtype=float)


def _drawn(tables: list[_Table], rows: int, seed: int) -> list[dict[str, np.ndarray]]:
    """For each table {metric: its RESAMPLES values}, all tables on the same draws of rows."""
    found: list[dict[str, list[np.ndarray]]] = [{m: [] for m in table.metrics} for table in tables]
    for weights in _weights(rows, seed):
        for table, values in zip(tables, found, strict=True):
            sums = weights @ table.array
            for metric in table.metrics:
                values[metric].append(table.combined(metric, sums))
    return [{m: np.concatenate(parts) for m, parts in values.items()} for values in found]


def _weights(rows: int, seed: int) -> Iterator[np.ndarray]:
    """[some draws, rows]: how often each row is drawn, rows at a time; RESAMPLES draws in all."""
    random = np.random.default_rng(seed)
    at_once = max(1, min(RESAMPLES, _DRAWN_AT_ONCE // rows))
    for start in range(0, RESAMPLES, at_once):
        draws = min(at_once, RESAMPLES - start)
        drawn = random.integers(0, rows, (draws, rows)) + rows * np.arange(draws)[:, None]
        yield np.bincount(drawn.ravel(), minlength=draws * rows).reshape(draws, rows).astype(float)


def _interval(value: float, values: np.ndarray | None) -> Interval:
    if values is None:
        return {"value": round(value, 4), "low": None, "high": None}
    low, high = np.percentile(values, [2.5, 97.5])
    return {
        "value": round(value, 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def _two_sided(values: np.ndarray) -> float:
    """One is added to both counts, so that no p is 0 (Davison & Hinkley 1997, 4.2)."""
    beyond = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return round(min(1.0, 2 * (beyond + 1) / (len(values) + 1)), 6)
