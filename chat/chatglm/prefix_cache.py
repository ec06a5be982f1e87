"""A key/value cache that starts with a learned prefix (docs/chatglm.md#9-prefix)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class PrefixLayer(DynamicLayer):
    """One layer's keys and values, behind P prefix entries that count neither as tokens nor as
    positions.
    """

    def __init__(self, key: Tensor, value: Tensor):
        """key, value: [b or 1, kv_heads, P, head_dim]; one row is expanded to the batch at the
        first update.
        """
        super().__init__()
        self.lazy_initialization(key, value)
        self.keys, self.values, self.prefix_length = key, value, key.shape[-2]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.keys.shape[0] != key_states.shape[0]:
            self.keys = self.keys.expand(key_states.shape[0], -1, -1, -1)
            self.values = self.values.expand(key_states.shape[0], -1, -1, -1)
        return super().update(
            key_states.to(self.dtype), value_states.to(self.dtype), *args, **kwargs
        )

    def get_seq_length(self) -> int:
        return super().get_seq_length() - self.prefix_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[-2] + query_length, 0


class PrefixCache(DynamicCache):
    """`generate(..., past_key_values=PrefixCache(prefix))` answers with the prefix on; positions do
    not shift.
    """

    def __init__(self, prefix: Tensor):
        """prefix: [layers, 2, kv_heads, P, head_dim] or, per row, [layers, 2, b, kv_heads, P,
        head_dim]; 0 key, 1 value.
        """
        super().__init__()
        rows = prefix.unsqueeze(2) if prefix.dim() == 5 else prefix
        self.layers = [PrefixLayer(key, value) for key, value in rows]
        self.layer_class_to_replicate = None
