"""Pages of datasets."""

from django.contrib import messages
from django.core.paginator import Paginator
from django.shortcuts import redirect, render
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_POST

from portal.access import get_visible
from tuning.models import Dataset

PER_PAGE = 20


@require_GET
def dataset_list(request):
    found = Dataset.objects.visible_to(request.user).select_related("owner").prefetch_related("versions")
    page = Paginator(found, PER_PAGE).get_page(request.GET.get("page"))
    return render(request, "tuning/dataset_list.html", {"page": page})


def columns(request):
    return redirect("dataset_list")


def upload(request):
    return redirect("dataset_list")


@require_GET
def detail(request, pk):
    dataset = get_visible(Dataset.objects.select_related("owner"), request.user, pk=pk)
    return render(request, "tuning/dataset_detail.html", {"dataset": dataset})


@require_POST
def split(request, pk):
    return redirect("dataset", pk=pk)


@require_POST
def rename(request, pk):
    return redirect("dataset", pk=pk)


@require_POST
def delete(request, pk):
    get_visible(Dataset.objects, request.user, pk=pk)
    messages.success(request, _("The dataset has been deleted."))
    return redirect("dataset_list")
