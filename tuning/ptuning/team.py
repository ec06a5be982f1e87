"""The processes that train together: each computes a share of a step's rows, and all of them do the
same update. Launched by accelerate (tuning/processes/); alone is the usual case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True)
class Team:
    """`rank` 0 writes what is kept and says how far the run is."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  where this process's words travel

    def share(self, lengths: list[int]) -> list[int]:
        """Which of a step's rows this process computes: every `size`-th of them by length, so that
        all have about as many tokens to compute.
        """
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        return sorted(order[self.rank :: self.size])

    def sum(self, *tensors: torch.Tensor) -> None:
        """Each tensor becomes, everywhere and in place, the sum over all processes."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so."""
        told = torch.tensor([float(flag)], device=self.device)
        self.sum(told)
        return bool(told.item())

    def gathered(self, thing: Any) -> list[Any]:
        """What every process has, in order of rank."""
        if self.size == 1:
            return [thing]
        everybodys: list[Any] = [None] * self.size
        distributed.all_gather_object(everybodys, thing)
        return everybodys


ALONE = Team()
