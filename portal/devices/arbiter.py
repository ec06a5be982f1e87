"""Who may lie on which device: the one place that writes claims. Chat, training, evaluation and
loading all ask here (portal/devices/placing.py decides, one at a time for each machine), and keep
asking until they are granted.

Claims end with their holder. A run's counts while the row is running with that token, so the life
cycle frees it together with the run (portal/runs/lifecycle.py). A worker renews a lease; one that
is over is looked at twice before it is swept, since the clock may have been set.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime, timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import F, Q, QuerySet
from django.utils import timezone

from portal.devices import inventory
from portal.devices.models import Device, DeviceClaim
from portal.devices.placing import CHAT, PAUSE, Granted, Held, Place, Refused, Wish, choose
from portal.models import Run
from portal.runs import lifecycle

LEASE = timedelta(seconds=30)  # of a worker's claim
BEAT = 5.0  # seconds between two renewals


def holder_of(run: Run) -> str:
    return f"run:{run.pk}"


def _live() -> Q:
    return Q(run=None) | Q(run__status=Run.Status.RUNNING, run__token=F("token"))


def claims() -> QuerySet[DeviceClaim]:
    """Those that count, the oldest first."""
    return DeviceClaim.objects.filter(_live()).select_related("device", "run__owner").order_by("id")


def ask(
    wish: Wish, *, run: Run | None = None, token: str = "", label: str = "", machine: str = ""
) -> Granted | Refused:
    """What the holder has is exchanged for the wish, if that is granted; else it keeps what it has
    and stands in line. Whoever is refused asks again about twice a second. token: the run's; raises
    lifecycle.FencedOff where that is over.
    """
    machine = machine or inventory.host()
    with transaction.atomic():
        if (
            run is not None
            and not Run.objects.filter(pk=run.pk, token=token, status=Run.Status.RUNNING).exists()
        ):
            raise lifecycle.FencedOff(run.pk)
        # one decision at a time: PostgreSQL locks the rows, SQLite has one writer anyway
        devices = list(Device.objects.select_for_update().filter(host=machine).order_by("id"))
        here = list(claims().filter(host=machine))
        mine = [claim for claim in here if claim.holder == wish.holder]
        outcome = choose(
            wish,
            [_place(device, here) for device in devices],
            _ahead(here, next((claim.pk for claim in mine if claim.device_id is None), None)),
            settings.BESIDE_CHAT,
        )
        common = {
            "host": machine,
            "holder": wish.holder,
            "use": wish.use,
            "label": label[:200],
            "run": run,
            "token": token,
            "lease_expires_at": None if run is not None else timezone.now() + LEASE,
        }
        if isinstance(outcome, Granted):
            _write_granted(outcome, devices, common)
        else:
            _write_refused(outcome, wish, mine, common)
    return outcome


def _place(device: Device, here: list[DeviceClaim]) -> Place:
    held = tuple(
        Held(claim.holder, claim.use, claim.bytes) for claim in here if claim.device_id == device.pk
    )
    return Place(device.name, device.bytes, device.usable, held)


def _ahead(here: list[DeviceClaim], my_place: int | None) -> list[Wish]:
    return [
        Wish(claim.holder, claim.use, claim.bytes, claim.least, tuple(claim.names))
        for claim in here
        if claim.device_id is None and (my_place is None or claim.pk < my_place)
    ]


def _write_granted(granted: Granted, devices: list[Device], common: dict) -> None:
    # also what an earlier token of the same run has left
    DeviceClaim.objects.filter(holder=common["holder"]).delete()
    DeviceClaim.objects.bulk_create(
        DeviceClaim(device=device, bytes=granted.shares[device.name], **common)
        for device in devices
        if device.name in granted.shares
    )


def _write_refused(refused: Refused, wish: Wish, mine: list[DeviceClaim], common: dict) -> None:
    DeviceClaim.objects.filter(holder=wish.holder, device=None).exclude(
        pk__in=[claim.pk for claim in mine]
    ).delete()
    reason = {
        "code": refused.code,
        "needs": wish.bytes,
        "device": refused.device,
        "free": refused.free,
        "total": refused.total,
        "holders": list(refused.holders),
    }
    waiting = next((claim for claim in mine if claim.device_id is None), None)
    if waiting is None:
        DeviceClaim.objects.create(
            bytes=wish.bytes, least=wish.least, names=list(wish.names), reason=reason, **common
        )
    elif (waiting.reason, waiting.bytes, waiting.least) != (reason, wish.bytes, wish.least):
        DeviceClaim.objects.filter(pk=waiting.pk).update(
            reason=reason, bytes=wish.bytes, least=wish.least, names=list(wish.names)
        )
    if refused.pausable and settings.BESIDE_CHAT == PAUSE:
        DeviceClaim.objects.filter(
            holder__in=refused.pausable, use=CHAT, device__isnull=False, asked_by=""
        ).update(asked_by=wish.holder)


def settle(holder: str, count: int) -> None:
    """What the holder really takes, where it has been granted devices: larger or smaller, spread
    as before. 0: nothing any more, but its place in line stays.
    """
    held = list(DeviceClaim.objects.filter(holder=holder, device__isnull=False).order_by("id"))
    if not count:
        DeviceClaim.objects.filter(pk__in=[claim.pk for claim in held]).delete()
        return
    total = sum(claim.bytes for claim in held) or 1
    for claim in held:
        DeviceClaim.objects.filter(pk=claim.pk).update(bytes=count * claim.bytes // total)


def release(holder: str, token: str = "") -> None:
    """The holder's claims, and its place in line; of a run those with its token."""
    DeviceClaim.objects.filter(holder=holder, token=token).delete()


def leave_line(holder: str) -> None:
    """It does not wait any more, and keeps what it has."""
    DeviceClaim.objects.filter(holder=holder, device=None).delete()


def asked_to_leave(holder: str) -> DeviceClaim | None:
    """The waiting claim of the run for which `holder` is to leave its device, while that waits."""
    askers = DeviceClaim.objects.filter(holder=holder).exclude(asked_by="").values("asked_by")
    return claims().filter(device=None, holder__in=askers).first()


def renew(holder: str) -> None:
    DeviceClaim.objects.filter(holder=holder, run=None).update(
        lease_expires_at=timezone.now() + LEASE
    )


def usable(names: Iterable[str], machine: str = "") -> bool:
    """Are the devices all there, and in service?"""
    names = list(names)
    rows = Device.objects.filter(
        host=machine or inventory.host(), name__in=names, missing_since=None, out_since=None
    )
    return rows.count() == len(names)


class Sweeper:
    """Deletes claims whose holder is lost; called every few seconds by whoever waits, and by the
    supervisor.
    """

    def __init__(self, patience: float = 2 * BEAT) -> None:
        """patience: seconds, of no clock that can be set, in which a living holder renews."""
        self._patience = patience
        # claim id -> the lease that is over, and when that was first seen
        self._overdue: dict[int, tuple[datetime | None, float]] = {}

    def sweep(self) -> None:
        """A lease that is over is looked at again later, as with runs: where the clock was set
        forward a living holder has renewed it by then.
        """
        now, seen = timezone.now(), time.monotonic()
        DeviceClaim.objects.exclude(_live()).delete()
        leased = DeviceClaim.objects.filter(run=None)
        # from before the clock was set back
        leased.filter(lease_expires_at__gt=now + LEASE).update(lease_expires_at=now + LEASE)
        overdue = {}
        for claim, lease in leased.filter(lease_expires_at__lt=now).values_list(
            "id", "lease_expires_at"
        ):
            known, since = self._overdue.get(claim, (None, seen))
            overdue[claim] = (lease, since if known == lease else seen)
            if seen - overdue[claim][1] >= self._patience and known == lease:
                leased.filter(pk=claim, lease_expires_at=lease).delete()
        self._overdue = overdue
