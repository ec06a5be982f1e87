"""Why something waits for a device, in words."""

from __future__ import annotations

from django.utils.translation import gettext as _

from portal.devices.models import DeviceClaim
from portal.devices.placing import CHAT


def gigabytes(count: int) -> str:
    """Bytes as people say them: 6.1 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.0f} MB"


def in_words(reason: dict | None) -> str:
    """The reason of a waiting claim, in the active language; empty for none."""
    if not reason:
        return ""
    sentence = {
        "no_device": _("There is no device on this machine that it may use."),
        "too_large": _("Needs %(needs)s; the largest device has %(total)s."),
        "gone": _("%(device)s is not there, or out of service."),
        "behind": _("Waits for %(device)s behind %(holders)s."),
        "busy": _("Needs %(needs)s on %(device)s, held by %(holders)s."),
        "memory": _("Needs %(needs)s on %(device)s, %(free)s are free: held by %(holders)s."),
    }[reason["code"]]
    return sentence % {
        "needs": gigabytes(reason["needs"]),
        "free": gigabytes(reason["free"]),
        "total": gigabytes(reason["total"]),
        "device": reason["device"],
        "holders": ", ".join(map(holder_in_words, reason["holders"])),
    }


def holder_in_words(holder: str) -> str:
    kind, _colon, which = holder.partition(":")
    return f"#{which}" if kind == "run" else _("chat")


def claim_in_words(claim: DeviceClaim) -> str:
    """Who it is, for everybody: a run by its number, chat with the model's name."""
    if claim.use == CHAT:
        return _("chat: %(model)s") % {"model": claim.label or "—"}
    return holder_in_words(claim.holder)
