"""Pages of evaluations."""

from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from evaluation.models import EvaluationRun
from portal.access import get_visible


@require_GET
def evaluation_run_list(request):
    return render(request, "evaluation/evaluationrun_list.html", {})


def evaluation_run_new(request):
    return redirect("evaluation_run_list")


@require_GET
def evaluation_run_detail(request, pk):
    get_visible(EvaluationRun.objects, request.user, pk=pk)
    return render(request, "evaluation/evaluationrun_detail.html", {})


@require_POST
def evaluation_run_cancel(request, pk):
    return redirect("evaluation_run", pk=pk)


@require_POST
def evaluation_run_resume(request, pk):
    return redirect("evaluation_run", pk=pk)
