"""Predictions as people read them: which rows, in which order, and where a text differs from its
reference.
"""

from __future__ import annotations

import difflib

from django.db.models import F, FloatField, OuterRef, Q, Subquery
from django.db.models.fields.json import KT
from django.db.models.functions import Cast, Length, Trim
from django.utils.html import conditional_escape, format_html
from django.utils.safestring import mark_safe
from django.utils.translation import gettext_lazy as _

from evaluation.intervals import ROUGE_L
from evaluation.models import EvaluationRun, Prediction

LONGEST_COMPARED = 2000  # characters; difflib is quadratic
TOO_LONG = 2  # times as long as its reference
REPEATED = 20.0  # percent of an answer that it had said before (evaluation/metrics/shape.py)

ORDERS = {
    "worst": _("Lost most first"),
    "best": _("Gained most first"),
    "row": _("In order"),
}
# without a base beside them
PLAIN_ORDERS = {"worst": _("Lowest first"), "best": _("Highest first"), "row": _("In order")}
FILTERS = {
    "": _("all"),
    "regressions": _("worse than the base"),
    "empty": _("empty"),
    "long": _("too long"),
    "repeated": _("repeats itself"),
    "flagged": _("noted for review"),
}


def value_of(metric: str):
    """A row's value of a metric, as a number of the database; null where it has none."""
    return Cast(KT(f"scores__{metric}"), FloatField())


def rows(run: EvaluationRun, order: str = "row", show: str = ""):
    """The run's predictions with rouge_l and, where there is a base, base_text, base_rouge_l and
    gain beside them. `order` of ORDERS, `show` of FILTERS; anything else is the first of both.
    """
    found = run.predictions.annotate(
        rouge_l=value_of(ROUGE_L),
        repetition=value_of("repetition"),
        said=Length(Trim("text")),
        wanted=Length(Trim("reference")),
    )
    by = "rouge_l"
    if run.baseline_id is not None:
        beside = Prediction.objects.filter(run=run.baseline_id, row=OuterRef("row"))
        found = found.annotate(
            base_text=Subquery(beside.values("text")[:1]),
            base_rouge_l=Subquery(beside.annotate(value=value_of(ROUGE_L)).values("value")[:1]),
            gain=F("rouge_l") - F("base_rouge_l"),
        )
        by = "gain"
    found = found.filter(_shown(show, run.baseline_id is not None))
    orders = {"worst": (F(by).asc(nulls_last=True), "row"), "best": (F(by).desc(nulls_last=True),)}
    return found.order_by(*orders.get(order, ()), "row")


def _shown(show: str, has_base: bool) -> Q:
    if show == "regressions" and has_base:
        return Q(gain__lt=0)
    if show == "empty":
        return Q(text__regex=r"^\s*$")
    if show == "long":
        return Q(said__gt=TOO_LONG * F("wanted"))
    if show == "repeated":
        return Q(repetition__gt=REPEATED)
    if show == "flagged":
        return Q(flagged=True)
    return Q()


def marked(reference: str, text: str, least: int = 2):
    """`text` as HTML, the runs of at least `least` characters that it shares with the reference, in
    order, in <mark>.
    """
    if len(text) > LONGEST_COMPARED or len(reference) > LONGEST_COMPARED:
        return conditional_escape(text)
    pieces, at = [], 0
    for block in _matcher(reference, text).get_matching_blocks():
        if block.size < least:
            continue
        pieces.append(conditional_escape(text[at : block.b]))
        at = block.b + block.size
        pieces.append(format_html('<mark class="same">{}</mark>', text[block.b : at]))
    pieces.append(conditional_escape(text[at:]))
    return mark_safe("".join(pieces))  # every piece has been escaped


def edits(reference: str, text: str):
    """From the reference to `text`, character by character, as HTML: <del> what is missing, <ins>
    what is new.
    """
    if len(text) > LONGEST_COMPARED or len(reference) > LONGEST_COMPARED:
        return conditional_escape(text)
    pieces = []
    for kind, a, b, c, d in _matcher(reference, text).get_opcodes():
        if kind == "equal":
            pieces.append(conditional_escape(reference[a:b]))
            continue
        if b > a:
            pieces.append(format_html("<del>{}</del>", reference[a:b]))
        if d > c:
            pieces.append(format_html("<ins>{}</ins>", text[c:d]))
    return mark_safe("".join(pieces))  # every piece has been escaped


def _matcher(reference: str, text: str) -> difflib.SequenceMatcher:
    return difflib.SequenceMatcher(None, reference, text, autojunk=False)


def told(prediction: Prediction, changes: bool = False) -> dict:
    """A row for the page; `changes`: edits in place of what is shared."""
    base = getattr(prediction, "base_text", None)
    show = edits if changes else marked
    return {
        "row": prediction.row,
        "number": prediction.row + 1,
        "prompt": prediction.prompt,
        "reference": prediction.reference,
        "text": show(prediction.reference, prediction.text),
        "base": None if base is None else show(prediction.reference, base),
        "rouge_l": prediction.rouge_l,
        "base_rouge_l": getattr(prediction, "base_rouge_l", None),
        "flagged": prediction.flagged,
        "scores": prediction.scores,
    }
