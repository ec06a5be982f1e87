"""Pages of tuning runs."""

from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from portal.access import get_visible
from tuning.models import TuningRun


@require_GET
def run_list(request):
    return render(request, "tuning/tuningrun_list.html", {"runs": TuningRun.objects.visible_to(request.user)})


def new_run(request):
    return redirect("tuning_run_list")


@require_GET
def detail(request, pk):
    run = get_visible(TuningRun.objects.select_related("owner"), request.user, pk=pk)
    return render(request, "tuning/tuningrun_detail.html", {"run": run})


@require_POST
def cancel(request, pk):
    return redirect("tuning_run", pk=pk)


@require_POST
def resume(request, pk):
    return redirect("tuning_run", pk=pk)
