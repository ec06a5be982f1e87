"""Where tokens stand: the part of attention that differs between families of models. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PositionPlan:
    """Where one request's tokens stand: `prefix` columns of a learned prefix, then the
    prompt, then the answer.

    offset: position of the first prompt token. context: prompt tokens that every token of the row
    sees (0: causal). mask_position: ChatGLM's position of [gMASK], which every token behind the
    prompt shares. prefix_bias: added to every attention score of the prefix's columns; it is the
    logarithm of SamplingParams.prefix_strength, so each column's weight is multiplied by that.
    """

    prefix: int
    offset: int = 0
    context: int = 0
    mask_position: int = 0
    prefix_bias: float = 0.0


class Positions(Protocol):
    """A family's rule. One position is what the model takes for one token: an int, or a tuple."""

    padding: Any  # the position of a padding token

    def plan(self, prompt: Sequence[int], prefix: int) -> PositionPlan:
        """For a prompt behind a prefix of `prefix` columns. Raises RequestRefused."""

    def prefill(self, plan: PositionPlan, start: int, count: int) -> list[Any]:
        """Positions of prompt tokens start .. start+count."""

    def decode(self, plans: Sequence[PositionPlan], indices: Sequence[int]) -> list[Any]:
        """Positions of the token with the given index (counted from the prompt's first) in each
        row.
        """

    def shape(self, flat: torch.Tensor, rows: int) -> torch.Tensor:
        """Positions of all queries, one after the other, as the model wants them."""
