"""Keys and values of earlier prompts, for conversations and system prompts that come again (causal
models only).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class _Kept:
    ids: np.ndarray  # [tokens] int64
    tensor: torch.Tensor  # [layers, 2, kv_heads, tokens, head_dim], without the adapter's prefix


class PromptCache:
    """Least recently used, bounded in bytes and in number, since each is looked at whenever a
    request comes. Keys and values depend on what stands before, so the adapter is part of the key.
    shortest: tokens below which nothing is reused.
    """

    def __init__(self, limit_bytes: int, shortest: int = 16, most: int = 256):
        self.limit_bytes, self.shortest, self.most = limit_bytes, shortest, most
        self.nbytes = self.hits = self.reused_tokens = 0
        self._kept: OrderedDict[int, tuple[str, _Kept]] = OrderedDict()
        self._next = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, adapter: str, ids: list[int], longer_than: int) -> torch.Tensor | None:
        """Keys and values of the longest kept beginning of `ids`; None when none is longer than
        `longer_than` tokens.
        """
        wanted = np.asarray(ids, dtype=np.int64)
        best, best_length = None, longer_than
        for key, (name, kept) in self._kept.items():
            if name != adapter:
                continue
            length = _common(kept.ids, wanted)
            if length > best_length:
                best, best_length = key, length
        if best is None:
            return None
        self._kept.move_to_end(best)
        self.count(best_length)
        return self._kept[best][1].tensor[:, :, :, :best_length]

    def count(self, tokens: int) -> None:
        """A prompt's first `tokens` tokens were taken over, from here or from a running request."""
        self.hits += 1
        self.reused_tokens += tokens

    def wants(self, adapter: str, ids: list[int]) -> bool:
        """Is it worth a copy: long enough, and not the beginning of what is kept already?"""
        if len(ids) < self.shortest:
            return False
        wanted = np.asarray(ids, dtype=np.int64)
        return not any(
            name == adapter
            and len(kept.ids) >= len(wanted)
            and _common(kept.ids, wanted) == len(wanted)
            for name, kept in self._kept.values()
        )

    def keep(self, adapter: str, ids: list[int], tensor: torch.Tensor) -> None:
        """Keep the keys and values of `ids`; shorter beginnings of the same text give way to it."""
        if tensor.nbytes > self.limit_bytes:
            return
        array = np.asarray(ids, dtype=np.int64)
        for key, (name, kept) in list(self._kept.items()):
            if name == adapter and _common(kept.ids, array) == len(kept.ids):
                self._drop(key)
        self._kept[self._next] = (adapter, _Kept(array, tensor))
        self._next += 1
        self.nbytes += tensor.nbytes
        while self.nbytes > self.limit_bytes or len(self._kept) > self.most:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: int) -> None:
        self.nbytes -= self._kept.pop(key)[1].tensor.nbytes


def common_length(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return _common(np.asarray(a, dtype=np.int64), np.asarray(b, dtype=np.int64))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    size = min(len(a), len(b))
    if not size:
        return 0
    differs = a[:size] != b[:size]
    first = int(differs.argmax())
    return first if differs[first] else size
