"""A CUDA kernel for products with packed weights: for few rows, where reading the weights is what
takes the time.

Triton comes with torch's CUDA builds. Without it, on a CPU, in another precision than fp16 or for
many rows `fused_linear` returns None and the caller unpacks and multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# More rows than this are bound by arithmetic: unpacking once and a plain product are then faster.
MOST_ROWS = 64


def fused_linear(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor | None:
    """x [..., in] times the packed weight [out, in * bits / 8], transposed: [..., out], or None if
    this is not for us.
    """
    rows = x.numel() // x.shape[-1]
    if triton is None or not x.is_cuda or rows > MOST_ROWS or x.dtype != torch.float16:
        return None
    return launch(x.reshape(rows, -1).contiguous(), packed, scale, bits).view(*x.shape[:-1], -1)


if triton is not None:

    @triton.autotune(
        configs=[
            triton.Config(
                {"BLOCK_OUT": out, "BLOCK_BYTES": size}, num_warps=warps, num_stages=stages
            )
            for out, size, warps, stages in (
                (16, 128, 2, 4),
                (16, 256, 4, 3),
                (32, 128, 4, 4),
                (32, 64, 4, 4),
                (64, 64, 4, 4),
                (64, 128, 8, 3),
            )
        ],
        key=["outputs", "row_bytes", "BITS", "BLOCK_ROWS"],
    )
    @triton.jit
    def _packed_linear(
        x,
        packed,
        scale,
        y,
        rows,
        outputs,
        row_bytes,
        BITS: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_OUT: tl.constexpr,
        BLOCK_BYTES: tl.constexpr,
    ):
        """One program computes BLOCK_OUT outputs of every row. Integers are exact in fp16, sums are
        fp32, and the scale is applied to the sum, so nothing can overflow before it.
        """
        row = tl.arange(0, BLOCK_ROWS)
        out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        inputs = row_bytes * 8 // BITS
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
        for start in range(0, row_bytes, BLOCK_BYTES):
            byte = start + tl.arange(0, BLOCK_BYTES)
            inside = (out[None, :] < outputs) & (byte[:, None] < row_bytes)
            at = packed + out[None, :].to(tl.int64) * row_bytes + byte[:, None]
            values = tl.load(at, mask=inside, other=0).to(tl.int32)
            known = (row[:, None] < rows) & (byte[None, :] < row_bytes)
            if BITS == 8:
                part = tl.load(x + row[:, None] * inputs + byte[None, :], mask=known, other=0.0)
                total = tl.dot(part, values.to(part.dtype), total)
            else:
                even = tl.load(x + row[:, None] * inputs + 2 * byte[None, :], mask=known, other=0.0)
                odd = tl.load(
                    x + row[:, None] * inputs + 2 * byte[None, :] + 1, mask=known, other=0.0
                )
                total = tl.dot(even, (values >> 4).to(even.dtype), total)
                total = tl.dot(odd, ((values << 28) >> 28).to(odd.dtype), total)
        factor = tl.load(scale + out, mask=out < outputs, other=0.0).to(tl.float32)
        written = (row[:, None] < rows) & (out[None, :] < outputs)
        total = total * factor[None, :]
        tl.store(
            y + row[:, None] * outputs + out[None, :], total.to(y.dtype.element_ty), mask=written
        )

    def launch(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        rows, outputs = x.shape[0], packed.shape[0]
        y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
        block_rows = max(16, triton.next_power_of_2(rows))
        grid = lambda settings: (triton.cdiv(outputs, settings["BLOCK_OUT"]),)  # noqa: E731
        _packed_linear[grid](
            x, packed, scale, y, rows, outputs, packed.shape[1], BITS=bits, BLOCK_ROWS=block_rows
        )
        return y
