"""The prefix encoder of P-tuning v2, and the prefix as a transformers cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin


class PrefixEncoder(nn.Module):
    """Trainable keys and values of every layer. Parameter names and initialisation are the
    original's (docs/chatglm.md#9-prefix).

    Without projection: embedding.weight [pre_seq_len, layers * 2 * kv_heads * head_dim], drawn from
    N(0, 1). With it: embedding.weight [pre_seq_len, hidden_size], then trans = Linear, Tanh, Linear
    to the same width.
    """

    def __init__(
        self,
        *,
        pre_seq_len: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        projection: bool = False,
        hidden_size: int | None = None,
        freeze_first: bool = False,
    ):
        """freeze_first: the first position stays as it begins. Attention rests on it where it has
        nothing to look for, and a prefix that starts from real text loses that when it is trained.
        """
        super().__init__()
        self.freeze_first = freeze_first
        self.pre_seq_len, self.layers, self.kv_heads, self.head_dim = (
            pre_seq_len,
            layers,
            kv_heads,
            head_dim,
        )
        width = layers * 2 * kv_heads * head_dim
        if projection:
            hidden_size = hidden_size or kv_heads * head_dim
            self.embedding = nn.Embedding(pre_seq_len, hidden_size)
            self.trans: nn.Module = nn.Sequential(
                nn.Linear(hidden_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, width)
            )
        else:
            self.embedding = nn.Embedding(pre_seq_len, width)
            self.trans = nn.Identity()

    @torch.no_grad()
    def begin_with(self, prefix: torch.Tensor) -> None:
        """Start from a given prefix [layers, 2, kv_heads, pre_seq_len, head_dim]."""
        self.embedding.weight.copy_(prefix.permute(3, 0, 1, 2, 4).flatten(1))

    def forward(self) -> torch.Tensor:
        """[layers, 2, kv_heads, pre_seq_len, head_dim] in float32: index 0 of dimension 1 the keys
        (not rotated), 1 the values.
        """
        flat = self.trans(self.embedding.weight)  # [pre_seq_len, layers * 2 * kv_heads * head_dim]
        if self.freeze_first:
            flat = torch.cat((flat[:1].detach(), flat[1:]))
        split = flat.view(self.pre_seq_len, self.layers, 2, self.kv_heads, self.head_dim)
        return split.permute(1, 2, 3, 0, 4)


class _PrefixLayer(CacheLayerMixin):
    """One layer's prefix. `update` joins it before the new keys and keeps nothing, so a layer may
    be computed twice.
    """

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values = keys, values  # [batch, kv_heads, pre_seq_len, head_dim]
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to allocate: the prefix is all that is kept."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys.to(key_states.device), self.values.to(value_states.device)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[-2] + query_length, 0

    def get_seq_length(self) -> int:
        return self.keys.shape[-2]

    def get_max_length(self) -> int:
        return -1


class TrainingPrefixCache(Cache):
    """A prefix as `past_key_values` of one forward over a whole batch.

    A forward leaves it unchanged, unlike transformers' DynamicCache, so gradient checkpointing may
    replay layers on it.
    """

    def __init__(self, prefix: torch.Tensor, batch: int, dropout: float = 0.0):
        """prefix: [layers, 2, kv_heads, pre_seq_len, head_dim] for the whole batch, or
        [layers, 2, batch, ...] with one for each row; dropout is drawn anew for every row, as the
        original does.
        """
        each = prefix.dim() == 6
        rows = prefix if each else prefix.unsqueeze(2).expand(-1, -1, batch, -1, -1, -1)
        if dropout:
            rows = nn.functional.dropout(rows, dropout)
        super().__init__(layers=[_PrefixLayer(layer[0], layer[1]) for layer in rows])
