"""How many requests fit: sized from free memory once, when the engine is built."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from chat.engine.kv_cache import KVCache
from chat.engine.request import LONGEST_PREFIX

if TYPE_CHECKING:
    from chat.engine.loading import Loaded

MOST_ROWS = {"cpu": 32, "cuda": 128}
# of free memory; the rest is for activations, adapters, the prompt store and a trainer beside it
CACHE_SHARE = 0.4
LAST_RESORT_SHARE = 0.85  # for the first row alone
PROMPT_CACHE_SHARE = 0.05
# tokens a request, unless asked for more: slots are as long as the longest request may be
MAX_LENGTH = 8192
# Where slots hold their prefixes: columns for one, when those of the longest would leave too few
# rows.
USUAL_PREFIX, ENOUGH_ROWS = 256, 16


@dataclass(frozen=True)
class Capacity:
    """rows: requests in one batch. max_length: prompt and answer tokens of one. columns: those and
    a prefix; a longer one leaves less for them.
    """

    rows: int
    max_length: int
    columns: int
    prompt_cache_bytes: int
    free_bytes: int


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on the device; on a CPU, within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or no limit ("max")
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)


def capacity_for(
    loaded: Loaded,
    max_rows: int | None,
    max_length: int | None,
    prefix_room: int | None,
    cache_share: float = CACHE_SHARE,
) -> Capacity:
    """prefix_room: columns for a prefix in every slot; None: as many as memory is good for. Raises
    ValueError when not even one request fits.
    """
    length = min(max_length or MAX_LENGTH, loaded.context_length)
    free = free_memory(loaded.device)
    most = max_rows or MOST_ROWS.get(loaded.device.type, 32)

    def columns_with(room: int) -> int:
        # a prefix that shifts positions lies within the context
        return min(length + room, loaded.context_length if loaded.shifts_positions else 2**31)

    def bytes_of(columns: int) -> int:
        return KVCache.bytes_per_row(
            layers=loaded.layers,
            kv_heads=loaded.kv_heads,
            head_dim=loaded.head_dim,
            columns=columns,
            dtype=loaded.dtype,
        )

    columns = columns_with(LONGEST_PREFIX if prefix_room is None else prefix_room)
    per_row = bytes_of(columns)
    if prefix_room is None and int(free * cache_share) // per_row < min(most, ENOUGH_ROWS):
        usual = columns_with(USUAL_PREFIX)
        per_row = bytes_of(usual)
        if loaded.device.type != "cpu":  # there a cache takes memory as it is written
            columns = usual
    # A card that the weights nearly fill still serves one request at a time, though nothing trains
    # beside it.
    fits = int(free * cache_share) // per_row or min(1, int(free * LAST_RESORT_SHARE) // per_row)
    rows = min(fits, most)
    if rows < 1:
        raise ValueError(
            f"one request of {length} tokens needs {per_row >> 20} MiB of key-value cache, "
            f"{free >> 20} MiB are free: "
            "lower the maximum length"
        )
    return Capacity(rows, length, columns, int(free * PROMPT_CACHE_SHARE), free)
