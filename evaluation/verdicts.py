"""What a difference says, in words."""

from __future__ import annotations

from typing import Any

from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from evaluation.intervals import FEW_ROWS
from evaluation.metrics import METRICS, known

LEVEL = 0.05  # of a false alarm, over all comparisons that are made at once

TONES = {"better": "good", "worse": "bad"}


def label_of(metric: str) -> str:
    found = known().get(metric)
    return _(found.label) if found else metric


def said(number: float, signed: bool = False) -> str:
    """A value or a difference with two decimals: 31.12, +4.20, −0.50."""
    text = f"{number:+.2f}" if signed else f"{number:.2f}"
    return text.replace("-", "−")


def interval(told: dict) -> str:
    """ "1.20 to 3.40"; for one row, that there is none."""
    if told.get("low") is None:
        return _("one row, no interval")
    ends = {"low": said(told["low"]), "high": said(told["high"])}
    return _("%(low)s to %(high)s") % ends


def of_metric(metric: str, told: dict, rows: int, compared: int = 1) -> dict[str, Any]:
    """{"verdict", "tone", "label", "sentence"} of one metric's difference.

    verdict: "better" or "worse" ("higher" or "lower" where neither is good) when the interval
    leaves out 0 and, among several comparisons, the corrected p is small too; else "cannot_tell",
    or "one_row".
    """
    rule = known().get(metric)
    names = {
        "metric": label_of(metric),
        "value": said(told["value"], signed=True),
        "interval": interval(told),
        "rows": rows,
    }
    if told.get("low") is None:
        return {
            "verdict": "one_row",
            "tone": "",
            "label": _("one row"),
            "sentence": _(
                "%(metric)s differs by %(value)s on the only row. One row says nothing about "
                "others."
            )
            % names,
        }
    beyond = told["low"] > 0 or told["high"] < 0
    corrected = told.get("p_corrected")
    sure = beyond and (corrected is None or corrected <= LEVEL)
    if not sure:
        sentence = _(
            "%(metric)s: %(value)s, and the interval %(interval)s holds zero: on these %(rows)s "
            "rows it may be chance."
        )
        if beyond:
            names["compared"] = compared
            sentence = _(
                "%(metric)s: %(value)s, interval %(interval)s. Alone it would count; among "
                "%(compared)s comparisons at once it may be chance (p %(p)s after Holm)."
            )
            names["p"] = f"{corrected:.3f}"
        return _told("cannot_tell", sentence % names, rows)
    rises = told["value"] > 0
    if rule is None or rule.better == "neither":
        verdict = "higher" if rises else "lower"
    else:
        verdict = "better" if rises == (rule.better == "higher") else "worse"
    sentences = {
        "better": _("%(metric)s is better: %(value)s, interval %(interval)s on %(rows)s rows."),
        "worse": _("%(metric)s is worse: %(value)s, interval %(interval)s on %(rows)s rows."),
        "higher": _("%(metric)s is higher: %(value)s, interval %(interval)s on %(rows)s rows."),
        "lower": _("%(metric)s is lower: %(value)s, interval %(interval)s on %(rows)s rows."),
    }
    return _told(verdict, sentences[verdict] % names, rows)


def _told(verdict: str, sentence: str, rows: int) -> dict[str, Any]:
    labels = {
        "better": "↑ " + _("better"),
        "worse": "↓ " + _("worse"),
        "higher": "↑ " + _("higher"),
        "lower": "↓ " + _("lower"),
        "cannot_tell": "≈ " + _("cannot tell"),
    }
    if rows < FEW_ROWS:
        sentence = f"{sentence} {few_rows(rows)}"
    return {
        "verdict": verdict,
        "tone": TONES.get(verdict, ""),
        "label": labels[verdict],
        "sentence": sentence,
    }


def few_rows(rows: int) -> str:
    """A warning for small evaluations, or ""."""
    if rows >= FEW_ROWS:
        return ""
    if rows == 1:
        return _("There is one row: its scores stand for themselves and have no interval.")
    return ngettext(
        "Only %(rows)s row: intervals of so few are narrower than they should be.",
        "Only %(rows)s rows: intervals of so few are narrower than they should be.",
        rows,
    ) % {"rows": rows}


def overall(differences: dict | None) -> dict[str, str] | None:
    """What the differences to the base say together, {"verdict", "tone", "label", "sentence"}, or
    None: better or worse when the original's four all say so (all of them must, so nothing needs
    correcting), else nobody can tell.
    """
    told = [found for metric, found in (differences or {}).items() if metric in METRICS]
    if not told:
        return None
    if any(each["low"] is None for each in told):
        return {
            "verdict": "one_row",
            "tone": "",
            "label": _("one row"),
            "sentence": few_rows(1),
        }
    if all(each["low"] > 0 for each in told):
        return {
            "verdict": "better",
            "tone": "good",
            "label": "↑ " + _("better than the base"),
            "sentence": _("Every interval of the differences lies above zero."),
        }
    if all(each["high"] < 0 for each in told):
        return {
            "verdict": "worse",
            "tone": "bad",
            "label": "↓ " + _("worse than the base"),
            "sentence": _("Every interval of the differences lies below zero."),
        }
    return {
        "verdict": "cannot_tell",
        "tone": "",
        "label": "≈ " + _("cannot tell"),
        "sentence": _(
            "At least one interval of the differences holds zero or they point different ways."
        ),
    }
