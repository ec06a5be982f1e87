"""Pages of evaluations: base beside tuned, with intervals, down to the single row."""

import difflib

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.core.paginator import Paginator
from django.db.models import F, FloatField, OuterRef, Subquery
from django.db.models.fields.json import KT
from django.db.models.functions import Cast
from django.shortcuts import redirect, render
from django.utils.html import conditional_escape, format_html
from django.utils.safestring import mark_safe
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_POST

from chat.models import Adapter
from evaluation.forms import EvaluationForm
from evaluation.intervals import METRICS, ROUGE_L
from evaluation.models import EvaluationRun, Prediction
from evaluation.plan import create_evaluation
from portal.access import get_visible
from portal.forms import add_errors
from portal.numbers import whole_number
from portal.runs import lifecycle
from portal.runs.once import once_per_form

PER_PAGE = 20
ROWS_PER_PAGE = 10
LONGEST_COMPARED = 2000  # characters; difflib is quadratic


@require_GET
def run_list(request):
    found = EvaluationRun.objects.visible_to(request.user)
    found = found.select_related(
        "owner", "adapter", "checkpoint", "baseline", "dataset_version__dataset"
    )
    page = Paginator(found, PER_PAGE).get_page(request.GET.get("page"))
    live = 3 if any(run.is_active for run in page) else None
    return render(
        request, "evaluation/evaluationrun_list.html", {"page": page, "page_is_live": live}
    )


def new_run(request):
    """`?adapter=` and `?dataset=` fill the form in."""
    if request.method == "POST":
        form = EvaluationForm(request.POST, user=request.user)
        if form.is_valid():
            try:
                run = once_per_form(request, lambda: create_evaluation(request.user, **form.plan()))
            except ValidationError as error:
                add_errors(form, error)
            else:
                return redirect("evaluation_run", pk=run.pk)
    else:
        form = EvaluationForm(initial=_initial(request), user=request.user)
    return render(request, "evaluation/evaluationrun_form.html", {"form": form})


def _initial(request) -> dict:
    adapters = Adapter.objects.visible_to(request.user)
    wanted = whole_number(request.GET.get("adapter"))
    adapter = adapters.first() if wanted is None else adapters.filter(pk=wanted).first()
    initial = {"dataset": request.GET.get("dataset")}
    if adapter:
        initial["model"] = f"adapter-{adapter.pk}"
        tuning = getattr(adapter.run, "tuningrun", None) if adapter.run else None
        if tuning and not initial["dataset"]:
            initial["dataset"] = tuning.dataset_version.dataset_id
    return initial


@require_GET
def detail(request, pk):
    found = EvaluationRun.objects.select_related(
        "owner", "adapter", "checkpoint", "dataset_version__dataset"
    )
    run = get_visible(found, request.user, pk=pk)
    # Whoever may see the tuned side may see the base beside it; its owner can be somebody else.
    baseline = run.baseline
    compared = run.difference
    order = request.GET.get("order", "worst" if compared else "row")
    page = Paginator(_predictions(run, baseline, order), ROWS_PER_PAGE).get_page(
        request.GET.get("page")
    )
    context = {
        "run": run,
        "baseline": baseline,
        "scale": _scale(run, baseline, compared),
        "verdict": _verdict(compared),
        "page": page,
        "rows": [_row(prediction) for prediction in page],
        "order": order,
        "mine": EvaluationRun.objects.changeable_by(request.user).filter(pk=pk).exists(),
        "page_is_live": 2 if run.is_active or (baseline and baseline.is_active) else None,
    }
    return render(request, "evaluation/evaluationrun_detail.html", context)


def _verdict(compared: dict | None) -> dict | None:
    """What the differences to the base say together: {"tone", "label", "sentence"}, or None.

    Better or worse when none of their intervals holds 0, else nobody can tell.
    """
    if not compared:
        return None
    if all(found["low"] > 0 for found in compared.values()):
        return {
            "tone": "good",
            "label": "↑ " + _("better than the base"),
            "sentence": _("Every interval of the differences lies above zero."),
        }
    if all(found["high"] < 0 for found in compared.values()):
        return {
            "tone": "bad",
            "label": "↓ " + _("worse than the base"),
            "sentence": _("Every interval of the differences lies below zero."),
        }
    return {
        "tone": "",
        "label": "≈ " + _("cannot tell"),
        "sentence": _(
            "At least one interval of the differences holds zero or they point different ways."
        ),
    }


def _scale(run, baseline, compared) -> dict | None:
    """The chart of the scores: positions in percent of an axis from 0 to a round number above the
    largest interval.
    """
    sides = [side for side in (baseline, run) if side is not None and side.scores]
    if not sides:
        return None
    highest = max(side.scores[metric]["high"] for side in sides for metric in METRICS)
    step = next((step for step in (1, 2, 5, 10, 20) if highest / step <= 5), 25)
    top = min(100, step * (int(highest // step) + 1))
    lines = []
    for metric in METRICS:
        marks = []
        for side in sides:
            score = side.scores[metric]
            marks.append(
                {
                    "tuned": side.adapter_id is not None,
                    "x": 100 * score["value"] / top,
                    "from": 100 * score["low"] / top,
                    "width": max(0.4, 100 * (score["high"] - score["low"]) / top),
                    **score,
                }
            )
        lines.append(
            {"name": metric.upper(), "marks": marks, "difference": (compared or {}).get(metric)}
        )
    return {
        "lines": lines,
        "ticks": [(100 * tick / top, tick) for tick in range(0, int(top) + 1, step)],
    }


def _predictions(run, baseline, order):
    """The rows with the base's text and score beside them; `worst`: where tuning lost most ROUGE-L
    first.
    """
    found = run.predictions.annotate(rouge_l=Cast(KT(f"scores__{ROUGE_L}"), FloatField()))
    if baseline is None:
        return found.order_by("rouge_l" if order == "worst" else "row")
    beside = Prediction.objects.filter(run=baseline, row=OuterRef("row"))
    found = found.annotate(
        base_text=Subquery(beside.values("text")[:1]),
        base_rouge_l=Subquery(
            beside.annotate(value=Cast(KT(f"scores__{ROUGE_L}"), FloatField())).values("value")[:1]
        ),
    )
    if order == "worst":
        return found.annotate(gain=F("rouge_l") - F("base_rouge_l")).order_by("gain", "row")
    return found.order_by("row")


def _row(prediction) -> dict:
    base = getattr(prediction, "base_text", None)
    return {
        "number": prediction.row + 1,
        "prompt": prediction.prompt,
        "reference": prediction.reference,
        "text": marked(prediction.reference, prediction.text),
        "base": None if base is None else marked(prediction.reference, base),
        "rouge_l": prediction.rouge_l,
        "base_rouge_l": getattr(prediction, "base_rouge_l", None),
    }


def marked(reference: str, text: str, least: int = 2):
    """`text` as HTML, the runs of at least `least` characters that it shares with the reference, in
    order, in <mark>.
    """
    if len(text) > LONGEST_COMPARED or len(reference) > LONGEST_COMPARED:
        return conditional_escape(text)
    pieces, at = [], 0
    for block in difflib.SequenceMatcher(
        None, reference, text, autojunk=False
    ).get_matching_blocks():
        if block.size < least:
            continue
        pieces.append(conditional_escape(text[at : block.b]))
        at = block.b + block.size
        pieces.append(format_html('<mark class="same">{}</mark>', text[block.b : at]))
    pieces.append(conditional_escape(text[at:]))
    return mark_safe("".join(pieces))  # every piece has been escaped


@require_POST
def cancel(request, pk):
    lifecycle.cancel(
        get_visible(EvaluationRun.objects.changeable_by(request.user), request.user, pk=pk)
    )
    messages.success(request, _("The evaluation stops; rows that have been answered are kept."))
    return redirect("evaluation_run", pk=pk)


@require_POST
def resume(request, pk):
    run = get_visible(EvaluationRun.objects.changeable_by(request.user), request.user, pk=pk)
    try:
        resumed = lifecycle.resume(run)
    except ValidationError as refused:
        messages.warning(request, refused.message)
        return redirect("evaluation_run", pk=pk)
    if resumed:
        messages.success(request, _("The evaluation goes on with the rows that are left."))
    else:
        messages.warning(request, _("Only a failed or cancelled run can go on."))
    return redirect("evaluation_run", pk=pk)
