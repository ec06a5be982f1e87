"""Loss curves of runs, as the run's page draws them."""

from typing import Any

from tuning.models import TuningRun
from tuning.sweeps import as_text

CHART_POINTS = 600  # more than the chart has pixels to show
MOST_CURVES = 8  # beside the run's own

Point = tuple[int, float, float | None]  # step, loss, loss on validation rows or None


def chart(run: TuningRun, others: list[TuningRun]) -> dict[str, Any]:
    """{"total": steps, "points": the run's own, "others": [{"label", "points"}, ...]}: the best
    variant of a sweep (the first while it goes on) is its own, the others stand beside it.
    """
    curves = _curves(run)
    own = curves.pop(_best_variant(run), [])
    beside = [
        {"label": variant_label(run, variant), "points": _thinned(points)}
        for variant, points in sorted(curves.items())
    ]
    for other in others:
        found = _curves(other)
        points = found.get(_best_variant(other), [])
        beside.append({"label": f"#{other.pk} {other.name}", "points": _thinned(points)})
    steps = (one.total or one.recipe.get("max_steps", 0) for one in (run, *others))
    return {"total": max(steps), "points": _thinned(own), "others": beside[:MOST_CURVES]}


def variant_label(run: TuningRun, variant: int) -> str:
    """What one variant of a sweep changes, behind its number."""
    sweep = run.recipe.get("sweep") or ()
    changes = as_text(sweep[variant : variant + 1])
    return f"{variant + 1}: {changes if len(changes) <= 40 else changes[:39] + '…'}"


def _best_variant(run: TuningRun) -> int:
    return next((number for number, one in enumerate(run.variants) if one["best"]), 0)


def _curves(run: TuningRun) -> dict[int, list[Point]]:
    """variant -> its points; 0 for a run that has none."""
    found: dict[int, list[Point]] = {}
    for variant, *point in run.metrics.values_list("variant", "step", "loss", "validation_loss"):
        found.setdefault(variant, []).append((point[0], point[1], point[2]))
    return found


def _thinned(points: list[Point]) -> list[Point]:
    """At most about CHART_POINTS of them, the last one always among them."""
    stride = len(points) // CHART_POINTS + 1
    return points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])
