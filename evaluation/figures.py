"""The scores of an evaluation as figures (portal/runs/figures.py)."""

from __future__ import annotations

from evaluation.metrics import in_order
from evaluation.models import EvaluationRun
from portal.runs.figures import Figure


def figures_of(run: EvaluationRun) -> list[Figure]:
    """Every score with the ends of its interval, and what the prefix cost of general ability; at
    the step at which the prefix was saved, so that steps of one run make a curve.
    """
    step = (run.adapter.step or 0) if run.adapter is not None else 0
    at = (run.finished_at or run.created_at).timestamp()
    found = {}
    for metric in in_order(list(run.scores or {})):
        score = (run.scores or {})[metric]
        found[f"score/{metric}"] = score["value"]
        found[f"interval_low/{metric}"] = score["low"]
        found[f"interval_high/{metric}"] = score["high"]
    general = run.general or {}
    for name in ("base_right", "right", "kept"):
        found[f"general/{name}"] = general.get(name)
    for name, loss in (general.get("loss") or {}).items():
        found[f"general/loss_{name}"] = loss
    return [Figure(tag, step, value, at) for tag, value in found.items() if value is not None]
