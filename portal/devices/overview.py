"""What there is and who has how much of it, for the page and by script; and the decisions on it,
each noted with who and when (portal/audit.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from django.conf import settings
from django.utils import timezone

from portal import audit
from portal.devices import arbiter, inventory, reasons
from portal.devices.models import Device, DeviceClaim
from portal.models import Run


@dataclass
class Shown:
    device: Device
    claims: list[DeviceClaim] = field(default_factory=list)

    @property
    def held(self) -> int:
        return sum(claim.bytes for claim in self.claims)

    @property
    def free(self) -> int:
        return max(0, self.device.bytes - self.held)

    @property
    def percent(self) -> int:
        return min(100, 100 * self.held // self.device.bytes)


def overview() -> tuple[list[Shown], list[DeviceClaim]]:
    """Every device with its claims; who waits, in order."""
    if not Device.objects.exists():  # nothing has asked for one yet
        inventory.register()
    devices = {device.pk: Shown(device) for device in Device.objects.select_related("out_by")}
    waiting = []
    for claim in arbiter.claims():
        if claim.device_id is None:
            waiting.append(claim)
        elif claim.device_id in devices:
            devices[claim.device_id].claims.append(claim)
    return list(devices.values()), waiting


def why_runs_wait() -> dict[int, str]:
    """run id -> why it has no device yet, of runs that have begun to wait for one."""
    return {
        claim.run_id: reasons.in_words(claim.reason)
        for claim in arbiter.claims().filter(device=None, run__isnull=False)
    }


def counted() -> bool:
    """Whether memory decides who may lie beside whom."""
    return settings.BESIDE_CHAT != "any"


def take_out(user, device: Device, reason: str = "") -> None:
    """What runs there saves and steps aside within seconds; nothing new begins there."""
    if Device.objects.filter(pk=device.pk, out_since=None).update(
        out_since=timezone.now(), out_reason=reason[:200], out_by=user
    ):
        audit.note(user, device, f"out of service: {reason[:200]}")


def put_back(user, device: Device) -> None:
    if Device.objects.filter(pk=device.pk, out_since__isnull=False).update(
        out_since=None, out_reason="", out_by=None
    ):
        audit.note(user, device, "back in service")


def name_for(user, run: Run) -> str | None:
    return run.name if user.is_staff or run.owner_id == user.pk else None
