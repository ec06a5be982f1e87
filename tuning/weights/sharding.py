"""Weights shared out over processes (FSDP, torch's fully_shard): each holds a part of every weight,
of its gradient and of Adam's moments, and they are put together for a layer while it is computed.

accelerate starts the processes; its own FSDP refuses to run on processors, torch's runs there as on
GPUs, so what is tested is what is used.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tuning.ptuning.batches import MicroBatch
from tuning.ptuning.team import Team


def share_out(whole_model: nn.Module, layers: nn.ModuleList, team: Team) -> None:
    """Layer by layer, then what is left. Gradients become the mean over the processes (a sum is not
    to be had of gloo).
    """
    mesh = init_device_mesh(team.device.type, (team.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(whole_model, mesh=mesh)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that the processes hold parts of; called in all of them."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of `tensor`, shared out as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@torch.no_grad()
def fill(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    parameter.copy_(part_of(tensor, parameter))


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with whole tensors."""
    moments = {
        number: {
            name: whole(value) if torch.is_tensor(value) else value for name, value in of.items()
        }
        for number, of in state["state"].items()
    }
    return {**state, "state": moments}


def parts_of_state(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """The reverse of `whole_state`, for an optimizer over `parameters`."""
    moments = {
        number: {
            name: part_of(value, parameters[number])
            if torch.is_tensor(value) and value.shape == parameters[number].shape
            else value
            for name, value in of.items()
        }
        for number, of in state["state"].items()
    }
    return {**state, "state": moments}


def equally_many(batches: list[MicroBatch], team: Team) -> list[MicroBatch]:
    """As many micro-batches in every process: one that has fewer computes its first again, for
    nothing.
    """
    most = max(team.gathered(len(batches)))
    first = batches[0]
    nothing = replace(first, weights=torch.zeros_like(first.weights))
    return batches + [nothing] * (most - len(batches))
