"""Linear layers through oneDNN on a CPU, in fp32 and with gradients to the input.

torch sends fp32 matrix products to MKL, which on AMD processors stays at half of what the processor
can do; oneDNN, which torch brings along, does not. Measured on one EPYC core: 1.5 (one row) to 2.6
times (16 rows and more) as fast, with packed weights; docs/engine.md has the table. And unlike
MKL's, a row's result does not depend on how many rows share the product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# of free memory that packed copies of the weights may take; beyond it they are used as they lie
PACKING_SHARE = 0.1
PACKED_FOR_ROWS = 16


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """inputs [..., in] times weight [out, in] (plain or packed) -> [..., out]."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class _FrozenLinear(torch.autograd.Function):
    """Gradient to the input only: the weights are frozen wherever this runs."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, packed: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(inputs, weight if packed is None else packed, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(gradients[0].contiguous(), weight.t(), None), None, None, None


class OneDNNLinear(nn.Linear):
    """What `accelerate_linear` makes of a frozen nn.Linear: same parameters, same names, same
    result up to rounding.
    """

    packed: Tensor | None
    packed_version: int
    to_be_packed: bool

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if (
            weight.requires_grad
            or weight._version != self.packed_version
            or input.dtype != torch.float32
        ):
            return super().forward(input)  # being trained, changed since, or under autocast
        if self.to_be_packed and self.packed is None:
            # at first use: the engine's flat forward has copies of its own and never comes here
            self.packed = _pack(weight)
        if input.requires_grad and torch.is_grad_enabled():
            return _FrozenLinear.apply(input, weight, self.packed, self.bias)
        return _product(input, weight if self.packed is None else self.packed, self.bias)


class PackedProduct:
    """Frozen linear layers with one input, as one product: [rows, in] -> [rows, sum of out].

    Without `pack` the weights are used as they lie, one product for each.
    """

    def __init__(self, layers: Sequence[nn.Linear], pack: bool):
        self._parts = [(layer.weight.detach(), layer.bias) for layer in layers]
        self._packed: Tensor | None = None
        self._bias: Tensor | None = None
        if pack:
            self._packed = _pack(torch.cat([weight for weight, _ in self._parts]))
            if any(bias is not None for _, bias in self._parts):
                self._bias = torch.cat(
                    [
                        weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
                        for weight, bias in self._parts
                    ]
                )

    def __call__(self, inputs: Tensor) -> Tensor:
        if self._packed is not None:
            return _product(inputs, self._packed, self._bias)
        made = [_product(inputs, weight, bias) for weight, bias in self._parts]
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR_ROWS)
    return packed


@contextlib.contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """For a forward that happens once: layers that were not packed yet are not packed for it."""
    waiting = [
        layer for layer in model.modules() if isinstance(layer, OneDNNLinear) and layer.to_be_packed
    ]
    for layer in waiting:
        layer.to_be_packed = False
    try:
        yield
    finally:
        for layer in waiting:
            layer.to_be_packed = True


def forget_packed(model: nn.Module) -> None:
    """After weights were changed in a way that leaves no trace (`weight.data`, as peft merges):
    they are packed anew.
    """
    for layer in model.modules():
        if isinstance(layer, OneDNNLinear):
            layer.packed, layer.packed_version = None, layer.weight._version


def frozen_linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """inputs [..., in] times a frozen weight [out, in], for layers that have no nn.Linear to be
    switched.

    Through oneDNN where that is for the better, fp32 on a CPU; otherwise torch's own product, also
    for weights being trained.
    """
    if (
        inputs.device.type != "cpu"
        or inputs.dtype != torch.float32
        or weight.dtype != torch.float32
    ):
        return nn.functional.linear(inputs, weight)
    if weight.requires_grad or not _works():
        return nn.functional.linear(inputs, weight)
    if inputs.requires_grad and torch.is_grad_enabled():
        return _FrozenLinear.apply(inputs, weight, None, None)
    return _product(inputs, weight, None)


def products_work(dtype: torch.dtype) -> bool:
    """Does oneDNN compute products of this type here, with instructions that are made for it?"""
    if dtype == torch.bfloat16:
        return _works() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and _works()


@cache
def _works() -> bool:
    """Does this build have the operator, and does it agree with torch's own?"""
    if not torch.backends.mkldnn.is_available():
        return False
    # no random state is used
    inputs, weight = (
        torch.linspace(-1, 1, 24).view(3, 8),
        torch.linspace(-2, 1, 40).view(5, 8),
    )
    try:
        return torch.allclose(_product(inputs, weight, None), inputs @ weight.t(), atol=1e-4)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def accelerate_linear(model: nn.Module, free_bytes: int) -> int:
    """Switch a model's frozen fp32 linear layers on the CPU to oneDNN; returns how many. Quantised
    layers stay as they are.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and not module.weight.requires_grad
    ]
    if not layers or not _works():
        return 0
    pack = sum(layer.weight.nbytes for layer in layers) <= PACKING_SHARE * free_bytes
    for layer in layers:
        layer.__class__ = OneDNNLinear
        assert isinstance(layer, OneDNNLinear)
        layer.packed_version = layer.weight._version
        layer.packed, layer.to_be_packed = None, pack
    return len(layers)
