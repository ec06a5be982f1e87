"""Means over rows with 95 % intervals, of one evaluation or of the difference between two. Pure:
numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUGE_L = "rouge-l"
METRICS = ("rouge-1", "rouge-2", ROUGE_L, "bleu-4")  # the one list; metrics.py counts them
RESAMPLES = 2000


def average(scores: Sequence[dict[str, float]], seed: int = 0) -> dict[str, dict[str, float]]:
    """{"rouge-1": {"value", "low", "high"}, ...}: the plain mean over the rows, as the original
    reports it, and its 95 % interval.

    The interval is the percentile bootstrap over rows: how far the mean would move on another draw
    of as many rows.
    """
    values = np.array(
        [[score[metric] for metric in METRICS] for score in scores], dtype=float
    ).reshape(-1, len(METRICS))
    return _intervals(values, seed)


def difference(
    scores: Sequence[dict[str, float]], baseline: Sequence[dict[str, float]], seed: int = 0
) -> dict[str, dict[str, float]]:
    """{"rouge-1": {"value", "low", "high"}, ...}: `scores` minus `baseline` on the same rows in the
    same order.

    The rows are resampled in pairs: how hard a row is cancels out, so the interval is much narrower
    than those of the two means suggest. A difference whose interval holds 0 may be chance.
    """
    if len(scores) != len(baseline):
        raise ValueError(
            f"scores of {len(scores)} rows cannot be paired with scores of {len(baseline)} rows"
        )
    pairs = zip(scores, baseline, strict=True)
    values = np.array(
        [[ours[m] - theirs[m] for m in METRICS] for ours, theirs in pairs], dtype=float
    )
    return _intervals(values.reshape(-1, len(METRICS)), seed)


def _intervals(values: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    """values [rows, metrics] -> mean, 2.5th and 97.5th percentile of the bootstrapped means, per
    metric.
    """
    rows = len(values)
    if not rows:
        return {metric: {"value": 0.0, "low": 0.0, "high": 0.0} for metric in METRICS}
    random = np.random.default_rng(seed)
    at_once = max(1, min(RESAMPLES, 2_000_000 // rows))  # bounds the memory of large datasets
    means = np.concatenate(
        [
            values[random.integers(0, rows, (min(at_once, RESAMPLES - start), rows))].mean(axis=1)
            for start in range(0, RESAMPLES, at_once)
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return {
        metric: {
            "value": round(float(values[:, index].mean()), 4),
            "low": round(float(low[index]), 4),
            "high": round(float(high[index]), 4),
        }
        for index, metric in enumerate(METRICS)
    }
