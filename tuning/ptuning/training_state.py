"""What a run saves on the way: everything that a later process needs to go on as if nothing had
happened.

One folder step-N, written under another name and renamed when it is complete, so that a kill leaves
the old one or the new one and never half of one. The newest two are kept: a disk may damage one.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

KEPT = 2
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
    try:
        with _Written(unfinished / "state.pt") as file:
            torch.save(state, file)  # type: ignore[arg-type]  # write and flush are all it asks
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)  # on a full disk every byte counts
        raise
    _sync(unfinished / "state.pt")
    if target.exists():  # the same step again, after a resume
        shutil.rmtree(target)
    os.replace(unfinished, target)
    _sync(folder)
    for _, older in _complete(folder)[:-KEPT]:
        shutil.rmtree(older)
    return target


class _Written:
    """A new file whose own error (a full disk) comes out, not torch's about a file that is too
    short.
    """

    def __init__(self, path: Path):
        self._file = open(path, "xb")  # noqa: SIM115  (this is one)
        self._error: OSError | None = None

    def __enter__(self) -> _Written:
        return self

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self._error = self._error or error
            raise

    def flush(self) -> None:
        self._file.flush()

    def __exit__(self, kind: object, fault: BaseException | None, _traceback: object) -> None:
        try:
            self._file.close()
        except OSError as error:  # what was still in the buffer
            self._error = self._error or error
        if self._error is not None:
            raise self._error from fault


def load_newest(folder: str | Path, device: torch.device) -> dict[str, Any] | None:
    """The newest complete state that can be read, or None when there is none. Read without
    executing pickled code.
    """
    for step, path in reversed(_complete(Path(folder))):
        try:
            return torch.load(path / "state.pt", map_location=device, weights_only=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
            logger.warning("the state after step %d is damaged: %s", step, e)
    return None


def delete_all(folder: str | Path) -> None:
    """When the run has ended well, its adapter is all that is worth its space."""
    shutil.rmtree(folder, ignore_errors=True)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
