"""Where ChatGLM's tokens stand and what they may see: 2-D positions, the prefix-LM mask and rotary
tables (docs/chatglm.md#3-attention, #4-masks-and-positions).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .configuration import ChatGLMConfig


def prompt_layout(input_ids: Tensor, config: ChatGLMConfig) -> tuple[Tensor, Tensor]:
    """Column of the first `<sop>` and of the mask token ([gMASK] if the row has one, else [MASK]):
    two [b] tensors.

    ValueError when a row lacks either, which is what right truncation of a finished prompt causes.
    """
    bos = input_ids.eq(config.bos_token_id)
    gmask, mask = input_ids.eq(config.gmask_token_id), input_ids.eq(config.mask_token_id)
    complete = bos.any(1) & (gmask.any(1) | mask.any(1))
    if not bool(complete.all()):
        row = int((~complete).nonzero()[0])
        missing = "<sop>" if not bool(bos[row].any()) else "[gMASK] or [MASK]"
        raise ValueError(
            f"row {row} of the input has no {missing}: a ChatGLM prompt ends in [gMASK] <sop>. "
            "Was it truncated after tokenizing, or tokenized without special tokens?"
        )
    mask_column = torch.where(gmask.any(1), gmask.int().argmax(1), mask.int().argmax(1))
    return bos.int().argmax(1), mask_column


def position_ids(input_ids: Tensor, config: ChatGLMConfig, visible: Tensor | None = None) -> Tensor:
    """[b, 2, s]: the place in the prompt, frozen at the mask token from `<sop>` on, and the place
    in the answer.

    visible: [b, s], 0 on padding. Positions count from a row's first visible token, so that a
    left-padded row is numbered
        as if it stood alone; padding gets 0. None: nothing is padding, as the original's model
        assumes.
    """
    context, mask_column = prompt_layout(input_ids, config)
    column = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    start = torch.zeros_like(context) if visible is None else visible.int().argmax(1)
    in_context = column < context[:, None]
    place = torch.where(in_context, column - start[:, None], (mask_column - start)[:, None]).clamp(
        min=0
    )
    block = (column - context[:, None] + 1).clamp(min=0)
    return torch.stack((place, block), dim=1)


def prefix_lm_hidden(
    input_ids: Tensor, config: ChatGLMConfig, visible: Tensor | None = None
) -> Tensor:
    """[b, 1, s, s] bool, True = hidden: causal, but everything before `<sop>` is visible to every
    row.

    visible: [b, s], 0 on padding; padding is hidden from all, and padding rows see nothing, as
    the original's tokenizer pads.
    """
    context, _ = prompt_layout(input_ids, config)
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    hidden = (column[None, :] > column[:, None]) & (column >= context[:, None])[:, None, :]
    if visible is not None:
        padding = visible == 0
        hidden = hidden | padding[:, None, :] | padding[:, :, None]
    return hidden[:, None]


def additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True = hidden) as a mask to add to the scores.

    The lowest finite number rather than -inf: a padding row that sees nothing then averages over
    all keys (in fp32 exactly what the original computes) and no NaN can spread.
    """
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
        hidden, torch.finfo(dtype).min
    )


@lru_cache(maxsize=16)
def _inverse_frequencies(half_dim: int, device: torch.device) -> Tensor:
    # Rounded to fp16 as the published model's buffer is, whatever the precision of the rest.
    exponent = torch.arange(0, half_dim, 2, dtype=torch.float32) / half_dim
    return (1.0 / 10000**exponent).half().to(device)


def rotary_tables(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [b, s, 1, 1, 2, head_dim // 4]: for the place and the block half of every
    head.

    In fp16 the angles themselves are fp16 products, as the original computes them: coarse at large
    positions (off by up to 0.45 near 2047), but what the published weights were trained and
    evaluated with. Otherwise angles are fp32.
    """
    frequencies = _inverse_frequencies(head_dim // 2, positions.device)
    precision = torch.float16 if dtype == torch.float16 else torch.float32
    angles = positions.transpose(1, 2)[..., None].to(precision) * frequencies.to(precision)
    angles = angles[:, :, None, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(queries_and_keys: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Apply 2-D rotary positions. `queries_and_keys`: [b, s, heads, 2, head_dim]; the result has
    the same shape.

    The first half of the head's features turns with the place, the second with the block; within a
    half, feature t turns together with feature t + head_dim // 4.
    """
    cos, sin = tables
    first, second = queries_and_keys.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = (
        torch.addcmul(first * cos, second, sin, value=-1),
        torch.addcmul(second * cos, first, sin),
    )
    return torch.stack(turned, dim=-2).flatten(-3)


def turn_places(keys: Tensor, by: int) -> Tensor:
    """Keys that were rotated at places p, as if they had been rotated at p + by; the block half
    stays as it is. keys: [kv_heads, s, head_dim], float32.
    """
    _, length, head_dim = keys.shape
    places = torch.full((1, 1, length), by, device=keys.device)
    turns = torch.cat((places, torch.zeros_like(places)), dim=1)  # [1, 2, s]
    as_queries = keys.transpose(0, 1)[None, :, :, None]  # [1, s, heads, 1, head_dim]
    turned = rotate(as_queries, rotary_tables(turns, head_dim, keys.dtype))
    return turned[0, :, :, 0].transpose(0, 1)
