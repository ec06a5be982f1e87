"""sacreBLEU and chrF as second opinions: over all rows at once, as papers report them.

Post 2018, "A Call for Clarity in Reporting BLEU Scores"; Popović 2015, "chrF". Rows are counted
one by one, so that the rows can be drawn again for an interval; test_metrics.py holds the totals to
sacrebleu's own corpus scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from evaluation.metrics.metric import _, metric

ORDERS = 6  # chrF: character n-grams of 1 to 6
BETA_SQUARED = 4.0  # recall counts twice as much as precision


@cache
def _library() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="zh", effective_order=True)


def _bleu_counts(prediction: str, reference: str) -> Sequence[float]:
    """[predicted length, reference length, 4 matches, 4 totals], in sacreBLEU's zh tokens."""
    found = _library().sentence_score(prediction, [reference])
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def bleu_of(sums: np.ndarray) -> np.ndarray:
    """[..., 10] -> BLEU in percent, with sacreBLEU's default smoothing (exp)."""
    predicted, expected = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2:6], sums[..., 6:10]
    # each order without a match halves what the next such order is given
    halvings = np.cumsum(matches == 0, axis=-1)
    smoothed = np.where(matches > 0, matches, 0.5**halvings)
    logs = np.log(smoothed / np.maximum(totals, 1)).mean(axis=-1)
    longer = np.minimum(0.0, 1.0 - expected / np.maximum(predicted, 1))
    known = (totals > 0).all(axis=-1) & (matches[..., 0] > 0)
    return np.where(known, 100.0 * np.exp(logs + longer), 0.0)


@metric(
    "sacrebleu",
    label=_("sacreBLEU"),
    explanation=_(
        "BLEU as papers report it: n-grams of 1 to 4 tokens, counted over all rows together "
        "(nrefs:1|case:mixed|eff:no|tok:zh|smooth:exp). Usually below BLEU-4, which is a mean over "
        "rows."
    ),
    count=_bleu_counts,
    combine=bleu_of,
)
def sacrebleu(prediction: str, reference: str) -> float:
    """One row's, with effective order."""
    return float(_library().sentence_score(prediction, [reference]).score)


def _ngrams(text: str) -> Iterator[Counter[str]]:
    joined = "".join(text.split())
    for order in range(1, ORDERS + 1):
        yield Counter(joined[at : at + order] for at in range(len(joined) - order + 1))


def _chrf_counts(prediction: str, reference: str) -> Sequence[float]:
    """[predicted, expected, matched] for each order; a prediction's n-grams count where the
    reference is long enough to have any.
    """
    counts: list[float] = []
    for ours, theirs in zip(_ngrams(prediction), _ngrams(reference), strict=True):
        expected = sum(theirs.values())
        counts += [sum(ours.values()) if expected else 0, expected, (ours & theirs).total()]
    return counts


def chrf_of(sums: np.ndarray) -> np.ndarray:
    """[..., 18] -> chrF2 in percent; orders that neither side has are left out."""
    predicted, expected, matched = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    used = (predicted > 0) & (expected > 0)
    orders = np.maximum(used.sum(axis=-1), 1)
    precision = np.where(used, matched / np.maximum(predicted, 1), 0).sum(axis=-1) / orders
    recall = np.where(used, matched / np.maximum(expected, 1), 0).sum(axis=-1) / orders
    below = BETA_SQUARED * precision + recall
    score = (1 + BETA_SQUARED) * precision * recall
    return 100.0 * np.divide(score, below, out=np.zeros_like(below), where=below > 0)


@metric(
    "chrf",
    label=_("chrF"),
    explanation=_(
        "Runs of 1 to 6 characters that answer and reference share, recall counted twice "
        "(chrF2|nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no). Needs no words, so it does not "
        "depend on how Chinese is cut."
    ),
    count=_chrf_counts,
    combine=chrf_of,
)
def chrf(prediction: str, reference: str) -> float:
    return float(chrf_of(np.array(_chrf_counts(prediction, reference), dtype=float)))
