"""What a run saves on the way: everything that a later process needs to go on as if nothing had
happened.

One folder step-N, written under another name and renamed when it is complete, so that a kill leaves
the old one or the new one and never half of one. Only the newest is kept.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step-(\d+)")
_UNFINISHED = ".unfinished-"


def _complete(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the states in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir()]
    return sorted((int(match.group(1)), entry) for match, entry in found if match)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: str | Path, step: int, state: dict[str, Any]) -> Path:
    """Writes `state` (tensors, numbers, strings, lists and dictionaries of them) as the state
    after `step`.
    """
    folder = Path(folder)
    target, unfinished = folder / f"step-{step:08d}", folder / f"{_UNFINISHED}{step:08d}"
    for leftover in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover)
    unfinished.mkdir(parents=True)
    torch.save(state, unfinished / "state.pt")
    _sync(unfinished / "state.pt")
    if target.exists():  # the same step again, after a resume
        shutil.rmtree(target)
    os.replace(unfinished, target)
    _sync(folder)
    for _, older in _complete(folder)[:-1]:
        shutil.rmtree(older)
    return target


def load_newest(folder: str | Path, device: torch.device) -> dict[str, Any] | None:
    """The newest complete state, or None when there is none. Read without executing
    pickled code.
    """
    found = _complete(Path(folder))
    if not found:
        return None
    return torch.load(found[-1][1] / "state.pt", map_location=device, weights_only=True)


def delete_all(folder: str | Path) -> None:
    """When the run has ended well, its adapter is all that is worth its space."""
    shutil.rmtree(folder, ignore_errors=True)
