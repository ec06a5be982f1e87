"""Prefixes of the steps that a run saves on the way, kept as adapters that may be published. No
Django: the processes of a run write them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chat.engine.adapters import KVPrefix

KEPT_STEPS = 20  # of a run; the oldest give way


def saved_steps(folder: Path) -> list[int]:
    """Steps that are kept in `folder`, newest first."""
    names = (entry.name for entry in folder.glob("step-*"))
    return sorted((int(name.removeprefix("step-")) for name in names), reverse=True)


def keeper(folder: Path, told: dict[str, Any]) -> Callable[[int, KVPrefix], None]:
    """What a trainer calls with each saved step. told: what the adapter says of its run."""

    def keep(step: int, prefix: KVPrefix) -> None:
        from chat.engine import adapters

        prefix.metadata |= {**told, "step": step}
        adapters.save(prefix, folder / f"step-{step}")
        for older in saved_steps(folder)[KEPT_STEPS:]:
            shutil.rmtree(folder / f"step-{older}", ignore_errors=True)

    return keep
