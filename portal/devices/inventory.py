"""What devices this machine has: those that PORTAL_DEVICES declares, else its graphics cards, else
its processor. No torch: the web process reads it too.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from pathlib import Path

import psutil
from django.conf import settings
from django.db import transaction
from django.utils import timezone
from django.utils.translation import gettext as _

from portal.devices.declared import Declared, Problem
from portal.devices.models import Device


def host() -> str:
    return platform.node()


def problem_in_words(problem: Problem) -> str:
    """In the active language."""
    sentence = {
        "name": _("“%(part)s”: a device is called cpu or cuda:0, cuda:1 …"),
        "amount": _("“%(part)s”: its memory is a positive number with MB, GB, MiB or GiB."),
        "too_small": _("“%(part)s”: a device has at least 64 MiB."),
        "too_large": _("“%(part)s”: a device has at most 1 PiB."),
        "twice": _("“%(part)s”: the device is declared twice."),
    }[problem.code]
    return sentence % {"part": problem.part}


class NoAnswer(Exception):
    """The driver does not tell just now what cards there are."""


def found() -> list[Declared]:
    """The devices that are really here. Raises NoAnswer."""
    cards = _cards()
    if cards and not settings.DEVICE.startswith("cpu"):
        return cards
    return [Declared("cpu", _main_memory())]


def _main_memory() -> int:
    total = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or no limit ("max")
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def _cards() -> list[Declared] | None:
    """As CUDA numbers them for this process; None without a driver. Raises NoAnswer."""
    argv = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(argv, capture_output=True, text=True, timeout=10).stdout
    except FileNotFoundError:
        return None
    except (OSError, subprocess.SubprocessError) as error:
        raise NoAnswer(str(error)) from error
    cards = {}
    for line in told.splitlines():
        with contextlib.suppress(ValueError):  # a card that fell off the bus
            index, uuid, memory = line.split(",")
            cards[index.strip()] = cards[uuid.strip()] = int(memory) << 20
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    order = (
        [key.strip() for key in visible.split(",") if key.strip()]
        if visible is not None
        else [key for key in cards if key.isdecimal()]
    )
    return [Declared(f"cuda:{n}", cards[key]) for n, key in enumerate(order) if key in cards]


def _here() -> list[Declared]:
    """What PORTAL_DEVICES declares and is there, or what is found. Raises NoAnswer."""
    if not settings.DEVICES:
        return found()
    cards = _cards() if any(each.name.startswith("cuda") for each in settings.DEVICES) else None
    there = None if cards is None else {card.name for card in cards}
    # Without a driver that tells (ROCm) what is declared is believed.
    return [
        each
        for each in settings.DEVICES
        if there is None or each.name in there or each.name.startswith("cpu")
    ]


def register(machine: str = "") -> list[Device]:
    """Writes down what this machine has now, and what it has no longer; returns its rows."""
    rows = Device.objects.filter(host=machine or host())
    try:
        here = _here()
    except NoAnswer:
        return list(rows.order_by("id"))
    with transaction.atomic():
        for each in here:
            told = {"bytes": each.bytes, "declared": bool(settings.DEVICES), "missing_since": None}
            rows.update_or_create(host=machine or host(), name=each.name, defaults=told)
        gone = rows.exclude(name__in=[each.name for each in here])
        gone.filter(missing_since=None).update(missing_since=timezone.now())
        declared = [each.name for each in settings.DEVICES]
        gone.filter(claims=None).exclude(name__in=declared).delete()
    return list(rows.order_by("id"))
