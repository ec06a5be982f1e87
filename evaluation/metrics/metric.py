"""What a metric is: how a row is measured, and how many rows become one number. Pure: numpy alone.

A metric is one function in one module of this package (docs/changing.md, "A metric"):

    from evaluation.metrics.metric import _, metric

    @metric("ends-well", label=_("Ends with a full stop"), better="higher", unit="%")
    def ends_well(prediction: str, reference: str) -> float:
        return 100.0 * prediction.rstrip().endswith(("。", "."))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Measure = Callable[[str, str], float]
Count = Callable[[str, str], Sequence[float]]
Combine = Callable[[np.ndarray], np.ndarray]


def _(text: str) -> str:
    """Marks a text for translation; whoever shows it translates it. This package knows no
    Django.
    """
    return text


@dataclass(frozen=True)
class Metric:
    """name: the key in JSON. label, explanation: for people, English, in the catalogue.

    better: which way is good; "neither" is described, not judged. unit: "%", or "" for a ratio or a
    plain number. measure(prediction, reference): one row's value. count(prediction, reference): one
    row's figures, which are summed over the rows and turned by combine([..., figures] -> [...])
    into the value of all; without them that value is the mean over the rows. published: what papers
    and repositories report, as orientation: (whose, value) each.
    """

    name: str
    label: str
    explanation: str = ""
    better: Literal["higher", "lower", "neither"] = "higher"
    unit: str = "%"
    published: tuple[tuple[str, float], ...] = ()
    measure: Measure | None = None
    count: Count | None = None
    combine: Combine | None = None

    @property
    def is_over_all_rows(self) -> bool:
        """Whether the value is no mean over the rows."""
        return self.combine is not None


def metric(
    name: str,
    *,
    label: str,
    explanation: str = "",
    better: Literal["higher", "lower", "neither"] = "higher",
    unit: str = "%",
    published: tuple[tuple[str, float], ...] = (),
    count: Count | None = None,
    combine: Combine | None = None,
) -> Callable[[Measure], Metric]:
    """Makes a Metric of a function of (prediction, reference)."""

    def made(measure: Measure) -> Metric:
        return Metric(name, label, explanation, better, unit, published, measure, count, combine)

    return made


def ratio(sums: np.ndarray) -> np.ndarray:
    """combine for two figures [..., 2]: the first over the second, 0 where there is nothing."""
    below = sums[..., 1]
    return np.divide(sums[..., 0], below, out=np.zeros_like(below, dtype=float), where=below > 0)
