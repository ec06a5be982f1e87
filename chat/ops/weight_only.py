"""Weights of linear layers held in 8 or 4 bits and multiplied as they lie, for families without a
packing of their own. Embeddings and the output layer stay as they are.

The layout and the products are torch's own (int8: one scale a row; int4: a scale and a zero point
for every GROUP weights of a row), those that torchao calls. torchao itself is not used: where it is
installed every start of transformers imports it, which takes seconds, and its int4 for processors
is a prototype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32  # weights of a row that share a scale in int4
TILES = 2  # inner k tiles of the layout for graphics cards


class Int8Linear(nn.Module):
    """x [..., in] times int8 [out, in] and scales [out]."""

    packed: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach().float()
        scales = weight.abs().amax(1).clamp(min=1e-9) / 127
        packed = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales.to(layer.weight.dtype))
        self.bias = layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.in_features)
        if rows.device.type == "cpu":
            product = torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.scales)
        else:
            product = F.linear(rows, self.packed.to(rows.dtype)) * self.scales
        if self.bias is not None:
            product = product + self.bias
        return product.reshape(*inputs.shape[:-1], self.out_features)


class Int4Linear(nn.Module):
    """x [..., in] times packed int4 [out, in] and [in / GROUP, out, 2] of scale and middle."""

    packed: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        numbers, scales = _int4(layer.weight.detach().float())
        if layer.weight.device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
        else:
            pairs = (numbers[:, ::2] << 4 | numbers[:, 1::2]).to(torch.uint8)
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs, TILES)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales.to(layer.weight.dtype))
        self.bias = layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.in_features)
        multiply = (
            torch.ops.aten._weight_int4pack_mm_for_cpu
            if rows.device.type == "cpu"
            else torch.ops.aten._weight_int4pack_mm
        )
        product = multiply(rows, self.packed, GROUP, self.scales)
        if self.bias is not None:
            product = product + self.bias
        return product.reshape(*inputs.shape[:-1], self.out_features)


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers 0 to 15, int32 [out, in]; scale and middle [in / GROUP, out, 2]): a weight is
    (number - 8) x scale + middle.
    """
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    least, most = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = (most - least).clamp(min=1e-9) / 15
    numbers = ((groups - least) / scale).round().clamp(0, 15).to(torch.int32)
    both = torch.cat([scale, least + 8 * scale], 2)
    return numbers.reshape(weight.shape), both.transpose(0, 1).contiguous()


def pack(model: nn.Module, precision: str) -> int:
    """Replaces the linear layers of a frozen model by packed ones; returns how many. They have no
    gradient: a packed model only answers.
    """
    head = getattr(model, "get_output_embeddings", None)
    output = head() if callable(head) else None
    packed = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer is output:
                continue
            if precision == "int8":
                setattr(parent, name, Int8Linear(layer))
            elif layer.in_features % GROUP == 0 and layer.out_features % 16 == 0:
                setattr(parent, name, Int4Linear(layer))
            else:
                continue
            packed += 1
    return packed


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, Int8Linear | Int4Linear) for module in model.modules())


def compute_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What to compute in; None: as without packing. torch's int4 product of a processor takes 60
    times as long in float32.
    """
    return torch.bfloat16 if precision == "int4" or device.type == "cuda" else None
