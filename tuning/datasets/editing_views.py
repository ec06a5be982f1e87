"""Pages that change a dataset's rows: a row as it is and as it is trained, what distinguishes two
versions, collected answers under review; and the buttons that merge and take away.
"""

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.core.paginator import Paginator
from django.http import Http404
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_POST

from chat.models import Checkpoint
from portal.access import get_visible
from portal.forms import add_errors
from portal.numbers import whole_number
from portal.page import reason
from tuning.datasets import checks, collecting, editing, exporting, store
from tuning.forms import RowForm
from tuning.models import CollectedExample, Dataset, DatasetVersion

PER_PAGE = 20


def _changeable(request, pk) -> Dataset:
    return get_visible(Dataset.objects.changeable_by(request.user), request.user, pk=pk)


def _is_mine(request, dataset) -> bool:
    return Dataset.objects.changeable_by(request.user).filter(pk=dataset.pk).exists()


def _version(dataset: Dataset, number) -> DatasetVersion:
    found = dataset.versions.filter(number=whole_number(number)).first()
    if found is None:
        raise Http404
    return found


def row(request, pk, split, line):
    """A row, for its owner to be changed or left out; `?checkpoint=` shows it as that base's
    trainer reads it.
    """
    dataset = get_visible(Dataset.objects.all(), request.user, pk=pk)
    mine, version = _is_mine(request, dataset), dataset.current
    if version is None or split not in version.splits:
        raise Http404
    try:
        found = store.examples(version, split, line - 1, 1)
    except ValidationError as error:
        messages.error(request, reason(error))
        return redirect("dataset", pk=pk)
    if not found or line < 1:
        raise Http404
    form = RowForm(
        request.POST or None,
        initial={
            "prompt": found[0]["prompt"],
            "response": found[0]["response"],
            "history": found[0]["history"],
            "version": version.number,
        },
    )
    if request.method == "POST":
        if not mine:
            raise Http404
        changed = _saved(request, dataset, split, line, form)
        if changed is not None:
            return redirect(f"{reverse('dataset', args=[pk])}?split={split}#rows")
    context = {
        "dataset": dataset,
        "version": version,
        "split": split,
        "line": line,
        "count": version.splits[split]["rows"],
        "row": found[0],
        "form": form,
        "mine": mine,
        **_trained(request, version, split, line),
    }
    return render(request, "tuning/dataset_row.html", context, status=422 if form.errors else 200)


def _saved(request, dataset, split, line, form) -> DatasetVersion | None:
    """The new version; None where the form has to be looked at again."""
    excluded = "exclude" in request.POST
    if not form.is_valid():
        return None
    fields = form.cleaned_data
    try:
        base = dataset.versions.filter(number=fields["version"]).first()
        if excluded:
            version = editing.change_rows(dataset, split, base=base, excluded=[line])
        else:
            prompt, response = (_as_typed(form, name) for name in ("prompt", "response"))
            row = editing.line_of(prompt, response, fields["history"])
            version = editing.change_rows(dataset, split, base=base, replaced={line: row})
    except ValidationError as error:
        add_errors(form, error)
        return None
    told = _("Row %(line)s is left out") if excluded else _("Row %(line)s has been changed")
    told = told % {"line": line}
    messages.success(request, f"{told}: v{version.number}.")
    return version


def _as_typed(form, name: str) -> str:
    """A text of the form. A browser sends each line end as CR and LF: what was not touched stays as
    the row has it, what was typed has the usual ones.
    """
    text, shown = form.cleaned_data[name].replace("\r\n", "\n"), form.initial.get(name, "")
    return shown if text == shown.replace("\r\n", "\n") else text


def _trained(request, version, split, line) -> dict:
    """The row's tokens for the chosen base; without one, the bases to choose from."""
    bases = Checkpoint.objects.visible_to(request.user).exclude(path="")
    context = {"bases": bases, "base": None}
    if not request.GET.get("checkpoint"):
        return context
    base = get_visible(bases, request.user, pk=request.GET["checkpoint"])
    wish = [
        whole_number(request.GET.get(name)) or 0
        for name in ("max_source_length", "max_target_length")
    ]
    try:
        source, target = checks.lengths_for(base, *wish)
        tokens = checks.row_as_trained(version, split, line, base, source, target)
    except ValidationError as error:
        return context | {"base": base, "fault": "; ".join(error.messages)}
    return context | {
        "base": base,
        "source": source,
        "target": target,
        "tokens": tokens,
        "learnt": sum(token["trained"] for token in tokens),
    }


def new_row(request, pk):
    dataset = _changeable(request, pk)
    base = dataset.current
    form = RowForm(request.POST or None, initial={"version": base.number if base else 0})
    if request.method == "POST" and form.is_valid():
        fields = form.cleaned_data
        try:
            texts = (_as_typed(form, name) for name in ("prompt", "response"))
            line = editing.line_of(*texts, fields["history"])
            version = editing.change_rows(dataset, base=base, added=[line])
        except ValidationError as error:
            add_errors(form, error)
        else:
            messages.success(request, _("The row has been added: v%s.") % version.number)
            return redirect("dataset", pk=pk)
    context = {"dataset": dataset, "form": form, "mine": True}
    return render(request, "tuning/dataset_row.html", context, status=422 if form.errors else 200)


@require_GET
def difference(request, pk, number):
    """What a version has other than the one before, split by split."""
    dataset = get_visible(Dataset.objects.all(), request.user, pk=pk)
    new = _version(dataset, number)
    old = dataset.versions.filter(number__lt=new.number).first()
    split = request.GET.get("split", "")
    if split not in new.splits:
        split = new.change.get("split", store.TRAIN)
    found = []
    if old is not None:
        try:
            found = editing.difference(old, new, split)
        except ValidationError as error:
            messages.error(request, reason(error))
    page = Paginator(found, PER_PAGE).get_page(request.GET.get("page"))
    context = {"dataset": dataset, "old": old, "new": new, "split": split, "page": page}
    return render(request, "tuning/dataset_difference.html", context)


def review(request, pk):
    """Answers from chat that wait to become rows. POST: `take` and `leave`, ids of examples."""
    dataset = get_visible(Dataset.objects.all(), request.user, pk=pk)
    mine = _is_mine(request, dataset)
    if request.method == "POST":
        if not mine:
            raise Http404
        try:
            version = collecting.decide(
                dataset,
                request.user,
                **{name: _ids(request, name) for name in ("take", "leave")},
            )
        except ValidationError as error:
            messages.error(request, reason(error))
        else:
            told = _("They are rows now: v%s.") % version.number if version else _("Left out.")
            messages.success(request, told)
        return redirect("dataset_review", pk=pk)
    found = CollectedExample.objects.visible_to(request.user).filter(
        dataset=dataset, status=CollectedExample.Status.WAITING
    )
    page = Paginator(found.select_related("by"), PER_PAGE).get_page(request.GET.get("page"))
    context = {"dataset": dataset, "page": page, "mine": mine}
    return render(request, "tuning/dataset_review.html", context)


def _ids(request, name: str) -> list[int]:
    return [number for text in request.POST.getlist(name) if (number := whole_number(text))]


@require_POST
def merge(request, pk):
    dataset = _changeable(request, pk)
    try:
        other = get_visible(Dataset.objects.all(), request.user, pk=request.POST.get("other"))
        version = editing.merge(dataset, other)
    except ValidationError as error:
        messages.error(request, reason(error))
        return redirect("dataset", pk=pk)
    messages.success(request, _("The rows have been added: v%s.") % version.number)
    return redirect("dataset_difference", pk=pk, number=version.number)


@require_GET
def export(request, pk, split, form):
    dataset = get_visible(Dataset.objects.all(), request.user, pk=pk)
    version = dataset.current
    if version is None or split not in version.splits or form not in exporting.TYPES:
        raise Http404
    try:
        return exporting.response(version, split, form)
    except ValidationError as error:
        messages.error(request, reason(error))
        return redirect("dataset", pk=pk)
