"""The metrics, each a Metric in a module of this package; found by looking, so that a new module is
all that a new metric needs. Pure: no torch, no Django.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, Protocol

from evaluation.metrics.headline import BLEU_4, PERPLEXITY, ROUGE_1, ROUGE_2, ROUGE_L
from evaluation.metrics.metric import Metric

__all__ = ["HEADLINE", "METRICS", "PERPLEXITY", "Measured", "Metric", "known", "measured"]

# the original's four: in lists, in the verdict, in the published files
HEADLINE = (ROUGE_1, ROUGE_2, ROUGE_L, BLEU_4)
METRICS = tuple(metric.name for metric in HEADLINE)
# words and n-grams counted by heavy libraries, and no metric of its own
_NOT_LOOKED_INTO = ("original", "metric")

log = logging.getLogger(__name__)


class Measured(NamedTuple):
    """One row: values by metric; figures by metric, of those that are combined over all rows."""

    scores: dict[str, float]
    counts: dict[str, list[float]]


class _Scores(Protocol):
    def score(self, prediction: str, reference: str) -> dict[str, float]: ...


@cache
def known() -> dict[str, Metric]:
    """Every metric by its name: the original's four first, the likelihood of the reference last."""
    found = {metric.name: metric for metric in HEADLINE}
    modules = (each.name for each in pkgutil.iter_modules(__path__))
    for module in sorted(modules, key=lambda name: (name == "headline", name)):
        if module in _NOT_LOOKED_INTO:
            continue
        for value in vars(importlib.import_module(f"{__name__}.{module}")).values():
            if isinstance(value, Metric):
                found.setdefault(value.name, value)
    return found


def measured(scorer: _Scores, prediction: str, reference: str) -> Measured:
    """A row by every metric that texts suffice for; `scorer` counts the original's four.

    A metric that breaks on a row has no value there, and so none for the evaluation; the log says
    why.
    """
    scores, counts = dict(scorer.score(prediction, reference)), {}
    for metric in known().values():
        if metric.measure is None:
            continue
        try:
            scores[metric.name] = round(float(metric.measure(prediction, reference)), 4)
            if metric.count is not None:
                counts[metric.name] = list(metric.count(prediction, reference))
        except Exception:
            log.exception("the metric %s broke on a row", metric.name)
            scores.pop(metric.name, None)
    return Measured(scores, counts)


def in_order(names: Sequence[str]) -> list[str]:
    """`names` as they are listed everywhere; those that no module knows any more last."""
    return [name for name in known() if name in names] + sorted(set(names) - set(known()))
