"""The page of a blind review, one row at a time, and its result."""

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.http import Http404
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_http_methods

from evaluation import blind
from evaluation.models import EvaluationRun
from portal.access import get_visible
from portal.numbers import whole_number


def _pair(request, pk, other):
    found = EvaluationRun.objects.select_related(
        "adapter", "checkpoint", "dataset_version__dataset"
    )
    sides = [get_visible(found, request.user, pk=each) for each in (pk, other)]
    try:
        return blind.pair(*sides)
    except ValidationError as problem:
        raise Http404(problem.messages[0]) from problem


@require_http_methods(["GET", "POST"])
def review(request, pk, other):
    run, against = _pair(request, pk, other)
    if request.method == "POST":
        row = whole_number(request.POST.get("row"))
        try:
            blind.vote(request.user, run, against, row, request.POST.get("side", ""))
        except ValidationError as problem:
            messages.warning(request, problem.messages[0])
        return redirect("blind_review", pk=run.pk, other=against.pk)
    question = blind.next_question(request.user, run, against)
    if question["row"] is None and question["done"]:
        return redirect("blind_result", pk=run.pk, other=against.pk)
    context = {"run": run, "other": against, "question": question}
    return render(request, "evaluation/blind.html", context)


@require_GET
def result(request, pk, other):
    run, against = _pair(request, pk, other)
    context = {
        "run": run,
        "other": against,
        "people": blind.result(run, against),
        "models": blind.result(run, against, judges=True),
        "chat": blind.in_chat(run, against),
        "left": len(blind.rows_that_differ(run, against)),
    }
    return render(request, "evaluation/blind_result.html", context)
