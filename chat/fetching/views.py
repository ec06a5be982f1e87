"""Pages of checkpoints on disk and of downloads."""

from django.contrib import messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.shortcuts import redirect, render
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_POST
from rest_framework.exceptions import APIException

from chat import inventory, serving
from chat.checkpoints.memory import estimates, machine
from chat.fetching.plan import create_fetch, set_endpoints
from chat.models import Checkpoint, FetchRun, Precision
from portal.access import get_visible
from portal.models import Run
from portal.page import reason
from portal.runs import lifecycle

LOG_BYTES = 16_000
RECENT = 10


def _staff_only(request) -> None:
    if not request.user.is_staff:
        raise PermissionDenied


@require_GET
def checkpoint_list(request):
    """What is on disk, how large it is, who uses it."""
    context = {
        "stored": inventory.stored(request.user),
        "orphans": inventory.orphans() if request.user.is_staff else [],
        "runs": FetchRun.objects.visible_to(request.user).select_related("owner")[:RECENT],
    }
    return render(request, "chat/checkpoint_list.html", context)


@require_GET
def checkpoint(request, pk):
    """One checkpoint: what it is, what it needs in memory, what hangs on it."""
    found = get_visible(Checkpoint.objects, request.user, pk=pk)
    rows: dict[str, list] = {}
    for estimate in estimates(found.description):
        rows.setdefault(estimate.use, []).append(estimate)
    stored = next(one for one in inventory.stored(request.user) if one.checkpoint.pk == found.pk)
    switch = serving.latest(found)
    context = {
        "checkpoint": found,
        "made_by": Run.objects.visible_to(request.user).filter(pk=found.run_id).first(),
        "stored": stored,
        "estimates": rows,
        "machine": machine(),
        "switch": switch,
        "precisions": Precision.choices,
        "page_is_live": 2 if switch and switch.is_active else None,
    }
    return render(request, "chat/checkpoint_detail.html", context)


@require_POST
def change_checkpoint(request, pk):
    """`action`: default, precision, delete."""
    _staff_only(request)
    found = get_visible(Checkpoint.objects, request.user, pk=pk)
    action = request.POST.get("action")
    try:
        if action == "delete":
            inventory.remove(found)
            messages.success(request, _("%(name)s has been deleted.") % {"name": found.name})
            return redirect("checkpoint_list")
        if action == "default":
            serving.serve(found, request.user)
            messages.success(request, _("The worker serves it as soon as it has loaded it."))
        if action == "precision":
            serving.set_precision(found, request.POST.get("precision", ""), request.user)
            messages.success(request, _("The precision has been saved."))
    except APIException as error:
        messages.error(request, reason(error))
    return redirect("checkpoint", pk=pk)


@require_POST
def delete_orphan(request):
    _staff_only(request)
    if inventory.remove_orphan(request.POST.get("key", "")):
        messages.success(request, _("The folder has been deleted."))
    return redirect("checkpoint_list")


@require_POST
def start(request):
    """A card of the catalogue or the form of any source; refusals go back to the page."""
    _staff_only(request)
    try:
        run, new = create_fetch(
            request.user,
            request.POST.get("source", ""),
            name=request.POST.get("name", "").strip(),
            default="default" in request.POST,
            accept_licence="accept_licence" in request.POST,
        )
    except ValidationError as error:
        messages.error(request, reason(error))
        return redirect("checkpoint_new")
    if not new:
        messages.info(request, _("This is being downloaded already."))
    return redirect("fetch_run", pk=run.pk)


@require_POST
def change_endpoints(request):
    _staff_only(request)
    try:
        for hub in ("hf", "modelscope"):
            set_endpoints(hub, request.POST.get(hub, "").split())
    except ValidationError as error:
        messages.error(request, reason(error))
    else:
        messages.success(request, _("The addresses have been saved."))
    return redirect("checkpoint_new")


@require_GET
def detail(request, pk):
    found = FetchRun.objects.select_related("owner", "checkpoint")
    run = get_visible(found, request.user, pk=pk)
    context = {
        "run": run,
        "mine": FetchRun.objects.changeable_by(request.user).filter(pk=pk).exists(),
        "log": run.log_tail(LOG_BYTES),
        "page_is_live": 2 if run.is_active else None,
    }
    return render(request, "chat/fetchrun_detail.html", context)


@require_POST
def cancel(request, pk):
    run = get_visible(FetchRun.objects.changeable_by(request.user), request.user, pk=pk)
    lifecycle.cancel(run)
    messages.success(request, _("The download stops. What has come is kept."))
    return redirect("fetch_run", pk=pk)


@require_POST
def resume(request, pk):
    run = get_visible(FetchRun.objects.changeable_by(request.user), request.user, pk=pk)
    if lifecycle.resume(run):
        messages.success(request, _("The download goes on where it ended."))
    else:
        messages.warning(request, _("Only a failed or cancelled run can go on."))
    return redirect("fetch_run", pk=pk)
