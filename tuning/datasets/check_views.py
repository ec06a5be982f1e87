"""Pages of checks: started from a dataset's page, watched and read on their own."""

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.shortcuts import redirect, render
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_POST

from chat.models import Checkpoint
from portal.access import get_visible
from portal.numbers import whole_number
from portal.page import reason
from portal.runs import lifecycle
from tuning.datasets import checks, measuring, store
from tuning.models import CheckRun, Dataset

LOG_BYTES = 16_000
_SHOWN = 20  # pairs and longest rows on the page


@require_POST
def start(request, pk):
    dataset = get_visible(Dataset.objects.all(), request.user, pk=pk)
    base = get_visible(Checkpoint.objects.all(), request.user, pk=request.POST.get("checkpoint"))
    try:
        run, _new = checks.create_check(
            request.user,
            dataset=dataset,
            checkpoint=base,
            split=request.POST.get("split") or store.TRAIN,
        )
    except ValidationError as error:
        messages.error(request, reason(error))
        return redirect("dataset", pk=pk)
    return redirect("check_run", pk=run.pk)


@require_GET
def detail(request, pk):
    """`?max_source_length=` and `?max_target_length=`: how many rows these would cut."""
    found = CheckRun.objects.select_related("owner", "checkpoint", "dataset_version__dataset")
    run = get_visible(found, request.user, pk=pk)
    context = {
        "run": run,
        "dataset": run.dataset_version.dataset,
        "split": run.recipe["dataset"]["split"],
        "mine": CheckRun.objects.changeable_by(request.user).filter(pk=pk).exists(),
        "log": run.log_tail(LOG_BYTES),
        "page_is_live": 2 if run.is_active else None,
    }
    if run.report:
        context |= _read(request, run)
    return render(request, "tuning/checkrun_detail.html", context)


def _read(request, run: CheckRun) -> dict:
    wish = [
        whole_number(request.GET.get(name)) or 0
        for name in ("max_source_length", "max_target_length")
    ]
    try:
        limits = checks.lengths_for(run.checkpoint, *wish)
    except ValidationError as error:
        messages.error(request, reason(error))
        limits = checks.lengths_for(run.checkpoint)
    parts = []
    for part, limit in zip(measuring.PARTS, limits, strict=True):
        bars = list(measuring.bars(run.report, part))
        parts.append(
            {
                "part": part,
                "limit": limit,
                "cut": measuring.longer(run.report, part, limit),
                "bars": bars,
                "highest": max((rows for _low, _high, rows in bars), default=1),
                "longest": run.report[part]["longest"][:_SHOWN],
            }
        )
    return {
        "parts": parts,
        "source": limits[0],
        "target": limits[1],
        "told": checks.told_of_cuts(run.report, *limits),
        "twins": run.report["near_duplicates"],
        "pairs": run.report["near_duplicates"]["pairs"][:_SHOWN],
    }


@require_POST
def cancel(request, pk):
    run = get_visible(CheckRun.objects.changeable_by(request.user), request.user, pk=pk)
    lifecycle.cancel(run)
    messages.success(request, _("The check stops."))
    return redirect("check_run", pk=pk)


@require_POST
def resume(request, pk):
    run = get_visible(CheckRun.objects.changeable_by(request.user), request.user, pk=pk)
    if not lifecycle.resume(run):
        messages.warning(request, _("Only a failed or cancelled run can go on."))
    return redirect("check_run", pk=pk)
