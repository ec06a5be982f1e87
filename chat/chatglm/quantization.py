"""Weights packed to 8 or 4 bits, as the public int8 and int4 checkpoints store them
(docs/chatglm.md#10-packed-weights).

Only the four linear layers of each block are packed. Per output row: scale = max|w| / 127 or / 7
and q = round(w / scale). 8 bits: one int8 per weight. 4 bits: byte j holds column 2j in its high
half and column 2j + 1 in its low half, both two's complement in -7..7. Weights stay packed in
memory; a product unpacks what it needs and forgets it again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from chat.ops.cpu_linear import frozen_linear

from .configuration import ChatGLMConfig
from .packed_matmul import fused_linear
from .streaming import fresh

# Weights unpacked at once on a CPU: 16 MB in fp32, small enough for the cache's sake and for
# memory's.
_CHUNK_WEIGHTS = 1 << 22
# Weights packed at once, for the same reasons.
_PACKED_AT_ONCE = 1 << 20


def pack(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """[out, in] float -> (packed int8 [out, in * bits / 8], scale [out]).

    Computed in the weight's own precision: fp16 weights give exactly the public checkpoints' bytes,
    fp32 weights those of the original's CPU path.
    """
    rows, columns = weight.shape
    if bits == 4 and columns % 2:
        raise ValueError(f"4-bit packing needs an even number of columns, not {columns}")
    packed = fresh((rows, columns * bits // 8), torch.int8, weight.device)
    scale = torch.empty(rows, dtype=weight.dtype, device=weight.device)
    limit = 2 ** (bits - 1) - 1
    some = min(rows, max(1, _PACKED_AT_ONCE // columns))  # rows are independent
    quotients = fresh((some, columns), weight.dtype, weight.device)
    integers = fresh((some, columns), torch.int8, weight.device)
    for start in range(0, rows, some):
        part, target = weight[start : start + some], packed[start : start + some]
        factor = torch.maximum(part.amax(dim=1), -part.amin(dim=1)) / limit
        scale[start : start + some] = factor
        # a row of zeros packs to zeros
        divisor = torch.where(factor == 0, torch.ones_like(factor), factor)
        rounded = (
            torch.div(part, divisor[:, None], out=quotients[: len(part)])
            .round_()
            .clamp_(-limit, limit)
        )
        if bits == 8:
            target.copy_(rounded)
        else:
            halves = integers[: len(part)].copy_(rounded).bitwise_and_(15)
            torch.bitwise_left_shift(halves[:, 0::2], 4, out=target).bitwise_or_(halves[:, 1::2])
    return packed, scale


def unpack(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype | None = None) -> Tensor:
    """The inverse of `pack`: [out, in] in `dtype` (default: the scale's)."""
    dtype = dtype or scale.dtype
    factor = scale.to(dtype)[:, None]
    if bits == 8:
        return packed.to(dtype) * factor
    weight = torch.empty(packed.shape[0], packed.shape[1], 2, dtype=dtype, device=packed.device)
    torch.mul((packed >> 4).to(dtype), factor, out=weight[..., 0])
    torch.mul(((packed << 4) >> 4).to(dtype), factor, out=weight[..., 1])
    return weight.flatten(1)


class _PackedProduct(torch.autograd.Function):
    """x @ unpack(weight).T; the gradient flows to x only, and only the packed weight is kept for
    it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.bits = bits
        fused = fused_linear(x, packed, scale, bits)
        if fused is not None:
            return fused
        parts = [
            frozen_linear(x, unpack(*rows, bits, x.dtype)) for rows in _chunks(packed, scale, bits)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        packed, scale = ctx.saved_tensors
        start, total = 0, None
        for rows, factors in _chunks(packed, scale, ctx.bits):
            weight = unpack(rows, factors, ctx.bits, gradient.dtype)
            part = gradient[..., start : start + len(rows)] @ weight
            total = part if total is None else total.add_(part)
            start += len(rows)
        return total, None, None, None


def _chunks(packed: Tensor, scale: Tensor, bits: int) -> list[tuple[Tensor, Tensor]]:
    # one large product; its temporary, at most 134 MB in the 6B model, is worth the speed
    if packed.is_cuda:
        return [(packed, scale)]
    rows = max(1, _CHUNK_WEIGHTS // (packed.shape[1] * 8 // bits))
    return list(zip(packed.split(rows), scale.split(rows), strict=True))


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed; bias is not."""

    def __init__(self, in_features: int, out_features: int, bits: int):
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        packed = torch.zeros(out_features, in_features * bits // 8, dtype=torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(out_features), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return _PackedProduct.apply(x, self.weight, self.weight_scale, self.bits) + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


def linear(config: ChatGLMConfig, in_features: int, out_features: int) -> nn.Module:
    """One of a block's four linear layers, packed when the checkpoint is."""
    bits = config.quantization_bit or 0
    return (
        PackedLinear(in_features, out_features, bits)
        if bits
        else nn.Linear(in_features, out_features)
    )


# Packing while loading: transformers' loader hands over one tensor at a time, so that the plain
# weights never are in memory together.


@register_quantization_config("chatglm_packed")
class PackOnLoad(QuantizationConfigMixin):
    """Ask the loader to pack a plain checkpoint's weights on their way in."""

    def __init__(self, bits: int, **kwargs):
        self.quant_method = "chatglm_packed"
        self.bits = bits


class _Pack(ConversionOps):
    def __init__(self, bits: int):
        self.bits = bits

    def convert(
        self, input_dict: dict, full_layer_name: str | None = None, missing_keys=None, **kwargs
    ) -> dict:
        (value,) = input_dict.values()
        packed, scale = pack(value[0] if isinstance(value, list) else value, self.bits)
        return {full_layer_name: packed, f"{full_layer_name}_scale": scale}


@register_quantizer("chatglm_packed")
class _PackingQuantizer(HfQuantizer):
    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        module_name, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(module_name), PackedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self.quantization_config.bits)

    def _process_model_after_weight_loading(self, model, **kwargs):
        # From here on it is the public packed layout, which config.quantization_bit alone
        # describes.
        self.remove_quantization_config(model)
        model.config._is_quantized = False
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
