"""The page of the devices."""

from django.core.exceptions import PermissionDenied
from django.http import Http404
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from portal.devices import overview
from portal.devices.models import Device
from portal.models import Run
from portal.numbers import whole_number


@require_GET
def devices(request):
    shown, waiting = overview.overview()
    runs = {claim.run_id for each in shown for claim in each.claims} | {
        claim.run_id for claim in waiting
    }
    visible = set(
        Run.objects.visible_to(request.user)
        .filter(pk__in=runs - {None})
        .values_list("pk", flat=True)
    )
    for claim in [claim for each in shown for claim in each.claims] + waiting:
        if claim.run is not None:
            claim.run.open = claim.run_id in visible
    several = len({each.device.host for each in shown}) > 1
    context = {"devices": shown, "waiting": waiting, "counted": overview.counted()}
    return render(request, "portal/devices.html", context | {"several_machines": several})


@require_POST
def decide(request):
    """`action`: out or back; for admins."""
    if not request.user.is_staff:
        raise PermissionDenied
    device = Device.objects.filter(pk=whole_number(request.POST.get("device")) or 0).first()
    if device is None:
        raise Http404
    if request.POST.get("action") == "out":
        overview.take_out(request.user, device, request.POST.get("reason", "").strip())
    elif request.POST.get("action") == "back":
        overview.put_back(request.user, device)
    else:
        raise Http404
    return redirect("devices")
