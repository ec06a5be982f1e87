"""Pages of evaluations: base beside tuned, with intervals, down to the single row."""

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.core.paginator import Paginator
from django.http import Http404, QueryDict
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_POST

from chat.models import Adapter, Checkpoint
from evaluation import charts, exports, fixing, reading, reviewing, upstream_files, verdicts
from evaluation.forms import EvaluationForm
from evaluation.intervals import ROUGE_L
from evaluation.metrics import in_order, known
from evaluation.models import EvaluationRun
from evaluation.plan import create_evaluation
from portal.access import get_visible
from portal.forms import add_errors
from portal.numbers import whole_number
from portal.runs import lifecycle
from portal.runs.once import once_per_form

FILES = (
    upstream_files.PREDICTIONS,
    upstream_files.RESULTS,
    exports.CSV,
    exports.JSON,
)
PER_PAGE = 20
REPORT_ROWS = 200  # most changed first; all rows are in the CSV
ROWS_PER_PAGE = 10


@require_GET
def run_list(request):
    found = EvaluationRun.objects.visible_to(request.user)
    found = found.select_related(
        "owner", "adapter", "checkpoint", "baseline", "dataset_version__dataset"
    ).defer("general", "baseline__general")
    page = Paginator(found, PER_PAGE).get_page(request.GET.get("page"))
    live = 3 if any(run.is_active for run in page) else None
    return render(
        request, "evaluation/evaluationrun_list.html", {"page": page, "page_is_live": live}
    )


def new_run(request):
    """`?adapter=`, `?checkpoint=` and `?dataset=` fill the form in."""
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
    chosen = whole_number(request.GET.get("checkpoint"))
    checkpoint = None
    if chosen is not None:
        checkpoint = Checkpoint.objects.visible_to(request.user).filter(pk=chosen).first()
    adapter = adapters.first() if wanted is None else adapters.filter(pk=wanted).first()
    initial = {"dataset": request.GET.get("dataset")}
    made_by = None
    if checkpoint:
        initial["model"], made_by = f"base-{checkpoint.pk}", checkpoint.run
    elif adapter:
        initial["model"], made_by = f"adapter-{adapter.pk}", adapter.run
    tuning = getattr(made_by, "tuningrun", None)
    if tuning and not initial["dataset"]:
        initial["dataset"] = tuning.dataset_version.dataset_id
    return initial


@require_GET
def detail(request, pk):
    found = EvaluationRun.objects.select_related(
        "owner", "adapter", "checkpoint", "dataset_version__dataset", "reviewed_by", "baseline"
    )
    run = get_visible(found, request.user, pk=pk)
    # Whoever may see the tuned side may see the base beside it; its owner can be somebody else.
    baseline = run.baseline
    compared = run.difference
    orders = reading.ORDERS if baseline else reading.PLAIN_ORDERS
    order = request.GET.get("order", "")
    order = order if order in orders else "worst" if compared else "row"
    show = request.GET.get("show", "")
    show = show if show in reading.FILTERS else ""
    changes = request.GET.get("marks") == "changes"
    page = Paginator(reading.rows(run, order, show), ROWS_PER_PAGE).get_page(
        request.GET.get("page")
    )
    mine = EvaluationRun.objects.changeable_by(request.user).filter(pk=pk).exists()
    context = {
        "run": run,
        "baseline": baseline,
        "scale": charts.score_chart([baseline, run], compared),
        "verdict": verdicts.overall(compared),
        "metrics": _metric_table(run, baseline, compared),
        "few": verdicts.few_rows(run.total) if run.scores else "",
        "general": _general(run),
        "distributions": charts.distributions(run) if run.scores else [],
        "page": page,
        "rows": [reading.told(prediction, changes) for prediction in page],
        "order": order,
        "orders": orders,
        "show": show,
        "filters": {
            name: label
            for name, label in reading.FILTERS.items()
            if baseline or name != "regressions"
        },
        "changes": changes,
        "mine": mine,
        "files": FILES,
        "may_review": reviewing.may_review(request.user),
        "page_is_live": 2 if run.is_active or (baseline and baseline.is_active) else None,
    }
    return render(request, "evaluation/evaluationrun_detail.html", context)


@require_GET
def report(request, pk):
    """One page to print or to send: scores, verdicts, what was forgotten, the rows that lost most
    and gained most.
    """
    found = EvaluationRun.objects.select_related(
        "owner", "adapter", "checkpoint", "dataset_version__dataset", "reviewed_by", "baseline"
    )
    run = get_visible(found, request.user, pk=pk)
    if not run.scores:
        raise Http404
    shown = reading.rows(run, "worst")[:REPORT_ROWS]
    context = {
        "run": run,
        "verdict": verdicts.overall(run.difference),
        "metrics": _metric_table(run, run.baseline, run.difference),
        "few": verdicts.few_rows(run.total),
        "general": _general(run),
        "rows": [reading.told(prediction, changes=True) for prediction in shown],
    }
    return render(request, "evaluation/report.html", context)


def _metric_table(run, baseline, compared) -> list[dict]:
    """Every metric of the run: value, the base's, the difference and what it says, and what the
    metric means.
    """
    if not run.scores:
        return []
    lines = []
    for name in in_order(list(run.scores)):
        metric, told = known().get(name), (compared or {}).get(name)
        beside = (baseline.scores or {}).get(name) if baseline else None
        lines.append(
            {
                "name": name,
                "label": verdicts.label_of(name),
                "score": run.scores[name],
                "interval": verdicts.interval(run.scores[name]),
                "base": beside,
                "told": told and verdicts.said(told["value"], signed=True),
                "told_interval": told and verdicts.interval(told),
                "verdict": told and verdicts.of_metric(name, told, run.total),
                "explanation": _(metric.explanation) if metric and metric.explanation else "",
                "published": metric.published if metric else (),
            }
        )
    return lines


def _general(run) -> dict | None:
    """The forgetting card: {"kept_percent", "gain", "rise", "lost", ...} beside what the run keeps,
    or None.
    """
    found = run.general
    if not found:
        return None
    knew = found["base_right"]
    baseline = run.baseline.scores if run.baseline else None
    before = (baseline or {}).get(ROUGE_L, {}).get("value")
    after = (run.scores or {}).get(ROUGE_L, {}).get("value")
    loss = found.get("loss")
    return {
        **found,
        "kept_percent": round(100 * found["kept"] / knew) if knew else None,
        "gain": after / before if before and after is not None else None,
        "rise": loss["tuned"] - loss["base"] if loss else None,
        "lost": [
            answer for answer in found["answers"] if answer["base_right"] and not answer["right"]
        ],
        "learnt": found["right"] - found["kept"],
    }


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


@require_POST
def review(request, pk):
    run = get_visible(EvaluationRun.objects, request.user, pk=pk)
    try:
        reviewing.review(
            request.user, run, request.POST.get("decision", ""), request.POST.get("note", "")
        )
    except ValidationError as refused:
        messages.warning(request, " ".join(refused.messages))
    else:
        messages.success(request, _("The decision is noted."))
    return redirect("evaluation_run", pk=pk)


@require_POST
def note_row(request, pk, row):
    """Notes a row for review, or takes the note back; `exclude` leaves it out of the dataset's next
    version.
    """
    run = get_visible(EvaluationRun.objects.changeable_by(request.user), request.user, pk=pk)
    if "exclude" in request.POST:
        try:
            version = fixing.exclude(request.user, run, row)
        except ValidationError as refused:
            messages.warning(request, refused.messages[0])
        else:
            told = _("Row %(row)s is left out of %(version)s; earlier versions stay as they are.")
            messages.success(request, told % {"row": row + 1, "version": version})
        return redirect(_rows_address(request, pk, row))
    changed = run.predictions.filter(row=row).update(flagged=request.POST.get("flagged") == "1")
    if not changed:
        raise Http404
    return redirect(_rows_address(request, pk, row))


def _rows_address(request, pk, row) -> str:
    """Back to where the row was, in the same order and filter."""
    kept = QueryDict(mutable=True)
    for name in ("order", "show", "marks", "page"):
        if request.POST.get(name):
            kept[name] = request.POST[name]
    query = f"?{kept.urlencode()}" if kept else ""
    return f"{reverse('evaluation_run', args=[pk])}{query}#row-{row}"
