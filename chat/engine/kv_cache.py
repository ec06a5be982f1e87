"""The KV cache: one slot per request, left aligned, handed to a model's ordinary forward as a
transformers Cache.

Every request owns one row of a fixed tensor, so a batch may hold rows of any length and any prefix:
the prefix stands in the row's first columns, the prompt and the answer behind it. Rows in use are
kept at the front (0, 1, 2 ...), so that a batch is a view, never a gather. What lies right of a
row's length is stale and masked; it must be finite all the same, because 0 times NaN is NaN: see
`wipe`.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ALIGNMENT = 16  # columns; keeps strided views aligned for the CUDA kernels
FIRST_COLUMNS = 256  # what a CPU cache begins with


def _aligned(columns: int) -> int:
    """Columns of a slot that holds `columns` tokens and one column that is nobody's."""
    return -(-(columns + 1) // ALIGNMENT) * ALIGNMENT


def layer_devices(model: torch.nn.Module, layers: int) -> list[torch.device]:
    """The device of each decoder layer, in order (several under device_map)."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            return [next(layer.parameters()).device for layer in module]
    return [next(model.parameters()).device] * layers


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. On a CPU an anonymous mapping in small pages, which takes memory as it is written;
    torch.zeros would take, and spend the time to write, all of it at once.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class KVCache(Cache):
    """Keys and values of `rows` requests of at most `columns` tokens (prefix included).

    Memory is one tensor [layers, 2, rows, kv_heads, columns, head_dim] per device; index 0 of
    dimension 1 is the key. Before each forward the engine says where the new keys go:
    `set_prefill_target` or `set_decode_target`.
    """

    def __init__(
        self,
        *,
        devices: Sequence[torch.device],
        kv_heads: int,
        head_dim: int,
        rows: int,
        columns: int,
        dtype: torch.dtype,
    ):
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.rows = rows
        self._most_columns = _aligned(columns)
        # CUDA graphs hold addresses, so there the whole cache is laid out at once.
        fixed = any(device.type != "cpu" for device in devices)
        self.columns = self._most_columns if fixed else min(FIRST_COLUMNS, self._most_columns)
        # (first layer, tensor of consecutive layers on one device)
        self._blocks: list[tuple[int, torch.Tensor]] = []
        start = 0
        for end in range(1, len(devices) + 1):
            if end == len(devices) or devices[end] != devices[start]:
                shape = (end - start, 2, rows, kv_heads, self.columns, head_dim)
                self._blocks.append((start, _zeros(shape, dtype, devices[start])))
                start = end
        self._lay_out()
        self._first, self._count, self._width = 0, 0, 0
        self._starts: list[int] = []
        self._fresh: list[int] = []
        self._row_index: torch.Tensor | None = None
        self._column_index: torch.Tensor | None = None

    def _lay_out(self) -> None:
        self._keys = [layer[0] for _, block in self._blocks for layer in block]
        self._values = [layer[1] for _, block in self._blocks for layer in block]

    def layers_in_memory(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, [rows, kv_heads, columns, head_dim], until `reserve`."""
        return list(zip(self._keys, self._values, strict=True))

    @property
    def trash_column(self) -> int:
        """A column that no request owns: the static decode path lets padding rows write there."""
        return self.columns - 1

    def reserve(self, columns: int, rows: int) -> None:
        """Make room for a request of `columns` tokens; the first `rows` rows keep what they hold.

        On a CPU the cache starts short and doubles: memory that no request has needed yet is not
        taken.
        """
        if _aligned(columns) <= self.columns:
            return
        wider = min(self._most_columns, max(2 * self.columns, _aligned(columns)))
        if wider < _aligned(columns):
            raise ValueError(
                f"a row has at most {self._most_columns} columns, {columns} were asked for"
            )
        for number, (first, block) in enumerate(self._blocks):
            grown = _zeros((*block.shape[:4], wider, block.shape[5]), block.dtype, block.device)
            grown[:, :, :rows, :, : self.columns] = block[:, :, :rows]
            self._blocks[number] = (first, grown)
        self.columns = wider
        self._lay_out()

    @staticmethod
    def bytes_per_row(
        *, layers: int, kv_heads: int, head_dim: int, columns: int, dtype: torch.dtype
    ) -> int:
        return layers * 2 * kv_heads * head_dim * dtype.itemsize * _aligned(columns)

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for _, block in self._blocks)

    # -- where the next forward writes

    def set_prefill_target(self, first: int, starts: Sequence[int], fresh: Sequence[int]) -> int:
        """Rows first, first+1, ...: row i takes its last `fresh[i]` queries at columns starts[i],
        starts[i]+1, ...

        Queries are right aligned (padding on the left). Returns the number of columns that the
        forward will see.
        """
        self._first, self._count, self._row_index = first, len(starts), None
        self._starts, self._fresh = list(starts), list(fresh)
        self._width = max(start + count for start, count in zip(starts, fresh, strict=True))
        return self._width

    def set_decode_target(
        self, row_index: torch.Tensor, column_index: torch.Tensor, width: int, first: int = 0
    ) -> None:
        """One new token in each row: row_index[i] (counted from 0) at column column_index[i];
        `width` columns are seen.
        """
        self._first, self._count, self._width = first, row_index.shape[0], width
        self._row_index, self._column_index = row_index, column_index

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [batch, kv_heads, queries, head_dim] keys and values; return those of every column
        in use.
        """
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        rows, columns = self._row_index, self._column_index
        if rows is not None and columns is not None:
            if rows.device != keys.device:
                rows, columns = rows.to(keys.device), columns.to(keys.device)
            keys[rows, :, columns] = key_states[:, :, 0]
            values[rows, :, columns] = value_states[:, :, 0]
        else:
            queries = key_states.shape[2]
            for i, (start, count) in enumerate(zip(self._starts, self._fresh, strict=True)):
                row = self._first + i
                keys[row, :, start : start + count] = key_states[i, :, queries - count :]
                values[row, :, start : start + count] = value_states[i, :, queries - count :]
        last = self._first + self._count
        return keys[self._first : last, :, : self._width], values[
            self._first : last, :, : self._width
        ]

    # -- whole rows

    def move(self, source: int, target: int, length: int) -> None:
        for _, block in self._blocks:
            block[:, :, target, :, :length] = block[:, :, source, :, :length]

    def put(self, row: int, column: int, tensor: torch.Tensor) -> None:
        """Copy [layers, 2, kv_heads, length, head_dim] to a row, from `column` on."""
        length = tensor.shape[3]
        for first, block in self._blocks:
            part = tensor[first : first + block.shape[0]]
            block[:, :, row, :, column : column + length] = part.to(block.device, non_blocking=True)

    def take(self, row: int, start: int, end: int) -> torch.Tensor:
        """A copy of a row's columns: [layers, 2, kv_heads, end - start, head_dim], on the first
        layer's device.
        """
        device = self._blocks[0][1].device
        return torch.cat([block[:, :, row, :, start:end].to(device) for _, block in self._blocks])

    def wipe(self, row: int) -> None:
        """Zero a row that may hold NaN, so that the next owner of the slot does not inherit it."""
        for _, block in self._blocks:
            block[:, :, row] = 0

    # -- what transformers asks of a Cache; masks are always given, so these answer for bookkeeping
    # only

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._width, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.columns

    def __len__(self) -> int:
        return len(self._keys)
