"""What things cost, in whole micro-units. Without a rate (portal/settings.py) there is no budget:
nothing is held, charged or shown.
"""

from __future__ import annotations

import os
from decimal import Decimal, InvalidOperation

from django.conf import settings

MICRO = 1_000_000  # micro-units of a unit
HOUR = 3_600_000  # milliseconds
MOST_RATE = 1_000_000  # units


def on() -> bool:
    return bool(settings.DEVICE_RATES) or bool(settings.TOKEN_RATE)


def rate(text: str) -> int:
    """A rate as it is written in a setting (units, with a point) in micro-units; ValueError for
    what is negative, too large, or finer than a micro-unit.
    """
    try:
        micro = Decimal(text.strip()) * MICRO
    except InvalidOperation:
        raise ValueError(text) from None
    if not micro.is_finite() or not 0 <= micro <= MOST_RATE * MICRO or micro != int(micro):
        raise ValueError(text)
    return int(micro)


def device_rates(text: str) -> dict[str, int]:
    """Of "10" or "10,cpu=0.5": micro-units an hour by kind of device, "" for all others."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, equals, amount = part.rpartition("=")
        if bool(equals) != bool(kind.strip()) or kind.strip() in found:
            raise ValueError(part)
        found[kind.strip()] = rate(amount)
    return found if any(found.values()) else {}


def device_kind() -> str:
    """Where runs are computed: "cuda", "cpu", ... The web process has no torch to ask."""
    named = settings.DEVICES[0].name if settings.DEVICES else settings.DEVICE
    if named:
        return named.partition(":")[0]
    return "cuda" if os.path.exists("/dev/nvidiactl") else "cpu"


def device_rate() -> int:
    """Micro-units for an hour of this portal's device."""
    rates = settings.DEVICE_RATES
    return rates.get(device_kind(), rates.get("", 0))


def of_device(milliseconds: int, micro_an_hour: int) -> int:
    """Rounded up: no time of a device is free."""
    return -(-milliseconds * micro_an_hour // HOUR)


def of_tokens(tokens: int, door: str = "") -> int:
    """Micro-units. A batch's tokens, for which nobody waits, cost half."""
    return -(-tokens * settings.TOKEN_RATE // (2000 if door == "batch" else 1000))


def units(micro: int) -> Decimal:
    return Decimal(micro) / MICRO


def in_words(micro: int) -> str:
    """For people: 1,234.5; two decimals at most."""
    text = f"{units(micro):,.2f}"
    return text.rstrip("0").rstrip(".")
