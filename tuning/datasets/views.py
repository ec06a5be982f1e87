"""Pages of datasets: list, upload with a suggested column mapping, one dataset with its problems
and rows.
"""

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.core.paginator import Paginator
from django.http import JsonResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_POST

from chat.models import Checkpoint
from portal.access import get_visible
from portal.forms import add_errors
from portal.page import reason
from tuning.datasets import store
from tuning.datasets.messages import change_in_words
from tuning.forms import NameForm, SplitForm, UploadForm
from tuning.models import CheckRun, CollectedExample, Dataset

PER_PAGE = 20


@require_GET
def dataset_list(request):
    found = (
        Dataset.objects.visible_to(request.user)
        .select_related("owner")
        .prefetch_related("versions")
    )
    page = Paginator(found, PER_PAGE).get_page(request.GET.get("page"))
    own = Dataset.objects.visible_to(request.user).exclude(owner=None).exists()
    return render(request, "tuning/dataset_list.html", {"page": page, "own": own})


@require_POST
def columns(request):
    """What the head of a chosen file suggests: {"columns", "prompt_column", ...} or {"problem"}.
    Nothing is stored.
    """
    head = request.FILES.get("file")
    if head is None:
        return JsonResponse({"problem": _("Choose a file.")}, status=400)
    try:
        found = store.detect_columns(head)
    except store.DatasetRejected as rejection:
        return JsonResponse({"problem": store.in_short(rejection)}, status=400)
    names = ("columns", "prompt_column", "response_column", "history_column", "encoding")
    first = {str(key): str(value)[:200] for key, value in found["row"].items()}
    return JsonResponse({name: found[name] for name in names} | {"row": first})


def upload(request):
    form = UploadForm(request.POST or None, request.FILES or None)
    rejection = None
    if request.method == "POST" and form.is_valid():
        try:
            dataset = store.ingest(owner=request.user, **form.cleaned_data)
        except store.DatasetRejected as error:
            rejection = error
        else:
            messages.success(request, _("The dataset has been checked and stored."))
            if (
                request.headers.get("Accept") == "application/json"
            ):  # the page's script, which shows the upload's progress
                return JsonResponse({"url": reverse("dataset", args=[dataset.pk])}, status=201)
            return redirect("dataset", pk=dataset.pk)
    context = {
        "form": form,
        "rejection": rejection,
        "kinds": rejection.problems if rejection else [],
    }
    return render(
        request,
        "tuning/dataset_form.html",
        context,
        status=422 if rejection or form.errors else 200,
    )


@require_GET
def detail(request, pk):
    dataset = get_visible(Dataset.objects.select_related("owner"), request.user, pk=pk)
    return render(request, "tuning/dataset_detail.html", _detail_context(request, dataset))


def _detail_context(request, dataset, split_form=None) -> dict:
    version = dataset.current
    split = request.GET.get("split")
    split = split if version and split in version.splits else "train"
    rows, page = [], None
    if version:
        page = Paginator(range(version.splits[split]["rows"]), PER_PAGE).get_page(
            request.GET.get("page")
        )
        try:
            rows = (
                store.examples(version, split, page.start_index() - 1, PER_PAGE)
                if page.object_list
                else []
            )
        except ValidationError as error:
            messages.error(request, reason(error))
    train_rows = version.splits["train"]["rows"] if version else 0
    return {
        "dataset": dataset,
        "version": version,
        "versions": [
            (one, change_in_words(one.change), one.number > 1) for one in dataset.versions.all()
        ],
        "waiting": CollectedExample.objects.visible_to(request.user)
        .filter(dataset=dataset, status=CollectedExample.Status.WAITING)
        .count(),
        "others": Dataset.objects.visible_to(request.user).exclude(pk=dataset.pk)[:100],
        "bases": Checkpoint.objects.visible_to(request.user).exclude(path=""),
        "check": CheckRun.objects.visible_to(request.user)
        .filter(dataset_version=version)
        .select_related("checkpoint")
        .first()
        if version
        else None,
        "split": split,
        "page": page,
        "rows": rows,
        "kinds": dataset.problems,
        "problem_count": dataset.problem_count,
        "mine": Dataset.objects.changeable_by(request.user).filter(pk=dataset.pk).exists(),
        "split_form": split_form or SplitForm(initial={"validation": max(1, train_rows // 10)}),
        "can_split": version is not None
        and store.VALIDATION not in version.splits
        and train_rows > 1,
    }


@require_POST
def split(request, pk):
    dataset = get_visible(Dataset.objects.changeable_by(request.user), request.user, pk=pk)
    form = SplitForm(request.POST)
    if form.is_valid():
        try:
            store.add_split(
                dataset, form.cleaned_data["validation"], seed=form.cleaned_data["seed"]
            )
        except ValidationError as error:
            add_errors(form, error)
        else:
            messages.success(
                request, _("The validation rows have been set aside as a new version.")
            )
            return redirect("dataset", pk=pk)
    return render(
        request, "tuning/dataset_detail.html", _detail_context(request, dataset, form), status=422
    )


@require_POST
def rename(request, pk):
    dataset = get_visible(Dataset.objects.changeable_by(request.user), request.user, pk=pk)
    form = NameForm(request.POST, instance=dataset)
    if form.is_valid():
        form.save()
    return redirect("dataset", pk=pk)


@require_POST
def delete(request, pk):
    dataset = get_visible(Dataset.objects.changeable_by(request.user), request.user, pk=pk)
    try:
        store.delete(dataset)
    except ValidationError as error:
        messages.error(request, reason(error))
        return redirect("dataset", pk=pk)
    messages.success(request, _("The dataset has been deleted."))
    return redirect("dataset_list")
