"""What PORTAL_DEVICES declares: "cuda:0=24GB,cuda:1=24GB" or "cpu=16GB". No Django: the settings
read it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 1 << 20, "GIB": 1 << 30}
SMALLEST, LARGEST = 64 << 20, 1 << 50  # bytes that a device can have
_NAME = re.compile(r"cpu(?::\d{1,3})?|cuda:\d{1,3}")
_AMOUNT = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)\s*(MB|GB|MIB|GIB)")


@dataclass(frozen=True)
class Declared:
    name: str  # cpu, cpu:N or cuda:N
    bytes: int


@dataclass(frozen=True)
class Problem:
    """`code`: name | amount | too_small | too_large | twice."""

    part: str
    code: str


def parse(text: str) -> tuple[tuple[Declared, ...], tuple[Problem, ...]]:
    """The devices, and every part that is none; in the order of the text."""
    devices: dict[str, Declared] = {}
    problems = []
    for part in filter(None, map(str.strip, text.split(","))):
        name, _equals, amount = (piece.strip() for piece in part.partition("="))
        size = _AMOUNT.fullmatch(amount.upper())
        count = int(float(size[1]) * UNITS[size[2]]) if size else 0
        code = ""
        if not _NAME.fullmatch(name):
            code = "name"
        elif size is None:
            code = "amount"
        elif count < SMALLEST:
            code = "too_small"
        elif count > LARGEST:
            code = "too_large"
        elif name in devices:
            code = "twice"
        if code:
            problems.append(Problem(part, code))
        else:
            devices[name] = Declared(name, count)
    return tuple(devices.values()), tuple(problems)
