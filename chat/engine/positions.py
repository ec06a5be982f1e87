"""Where tokens stand, and which of them see which: the part of attention that differs between
architectures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chat.engine.request import RequestRefused


@dataclass(frozen=True)
class Places:
    """One request's place: `prefix` columns of a learned prefix, then the prompt, then the answer.

    offset: position of the first prompt token. context: prompt tokens that every token of the row
    sees (0: causal). mask_position: ChatGLM's position of [gMASK], which every token behind the
    prompt shares.
    """

    prefix: int
    offset: int = 0
    context: int = 0
    mask_position: int = 0


class CausalPositions:
    """One position per token, causal mask: every architecture of transformers except ChatGLM."""

    atomic_prefill = False

    def __init__(self, loaded: Any):
        self._shifts = loaded.shifts_positions

    def places(self, prompt: Sequence[int], prefix: int) -> Places:
        return Places(prefix=prefix, offset=prefix if self._shifts else 0)

    def prefill(self, places: Places, start: int, count: int) -> list[int]:
        """Positions of prompt tokens start .. start+count."""
        first = places.offset + start
        return list(range(first, first + count))

    def decode(self, places: Sequence[Places], indices: Sequence[int]) -> list[int]:
        """Positions of the token with the given index (counted from the prompt's first) in each
        row.
        """
        return [place.offset + index for place, index in zip(places, indices, strict=True)]

    @staticmethod
    def shape(flat: torch.Tensor, rows: int) -> torch.Tensor:
        """[rows * queries] as the model wants it: [rows, queries]."""
        return flat.view(rows, -1)

    padding: int | tuple[int, int] = 0


class ChatGLMPositions:
    """Two positions per token: place in the prompt, and place in the answer (SPEC 4). The prompt
    sees itself whole.

    A position is a pair (prompt position, block position).
    """

    atomic_prefill = True
    padding: int | tuple[int, int] = (0, 0)

    def __init__(self, loaded: Any):
        config = loaded.model.config
        self._sop, self._marks = config.bos_token_id, (config.gmask_token_id, config.mask_token_id)

    def places(self, prompt: Sequence[int], prefix: int) -> Places:
        mark = next((mark for mark in self._marks if mark in prompt), None)
        if mark is None or self._sop not in prompt:
            raise RequestRefused(
                "invalid_value",
                "a ChatGLM prompt holds [gMASK] or [MASK], and <sop>",
                param="prompt_ids",
            )
        return Places(
            prefix=prefix, context=prompt.index(self._sop), mask_position=prompt.index(mark)
        )

    @staticmethod
    def _position(places: Places, index: int) -> tuple[int, int]:
        if index < places.context:
            return index, 0
        return places.mask_position, index - places.context + 1

    def prefill(self, places: Places, start: int, count: int) -> list[tuple[int, int]]:
        return [self._position(places, index) for index in range(start, start + count)]

    def decode(self, places: Sequence[Places], indices: Sequence[int]) -> list[tuple[int, int]]:
        return [self._position(place, index) for place, index in zip(places, indices, strict=True)]

    @staticmethod
    def shape(flat: torch.Tensor, rows: int) -> torch.Tensor:
        """[rows * queries, 2] -> [rows, 2, queries]."""
        return flat.view(rows, -1, 2).transpose(1, 2)


def positions_for(loaded: Any) -> CausalPositions | ChatGLMPositions:
    return ChatGLMPositions(loaded) if loaded.bidirectional_prompt else CausalPositions(loaded)


def decode_mask(column_index: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive [rows, 1, 1, width]: a row sees its columns up to and including
    column_index[row].
    """
    hidden = torch.arange(width, device=column_index.device)[None] > column_index[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=column_index.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]


def prefill_mask(
    places: Sequence[Places],
    starts: Sequence[int],
    fresh: Sequence[int],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Additive [rows, 1, queries, width] of a prefill with right-aligned queries; starts and fresh
    as in SlotCache.aim_prefill.

    Padding queries see the columns of their row's first token, so that no softmax is empty.
    """
    queries = max(fresh)
    own = torch.tensor(
        [start + count - queries for start, count in zip(starts, fresh, strict=True)], device=device
    )
    # [rows, queries] column of each query
    own = own[:, None] + torch.arange(queries, device=device)
    own = own.maximum(torch.tensor(starts, device=device)[:, None])
    shared = torch.tensor([place.prefix + place.context for place in places], device=device)
    last_seen = own.maximum(shared[:, None] - 1)
    hidden = torch.arange(width, device=device)[None, None] > last_seen[..., None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
