"""One token for every row. On a GPU the step is replayed from a CUDA graph, because launching it
costs more than running it.

A 28-layer step launches about a thousand kernels: 8-12 ms of host time against a floor of 2.6 ms
(design measurement on an H200). A graph fixes shapes and addresses, so rows are padded up to a
bucket and the cache's width to a multiple of 256 columns. The same static path runs without capture
on a CPU, where the tests hold it against the plain one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any

import torch

from chat.engine.attention import rows_of_similar_length
from chat.engine.kv_cache import KVCache
from chat.engine.loading import Loaded
from chat.engine.masks import PrefixBias, decode_mask
from chat.engine.positions import PositionPlan, Positions
from chat.engine.sequence import Sequence

log = logging.getLogger(__name__)

ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
WIDTH_STEP = 256  # columns
# runs before capture, so that libraries allocate and choose kernels outside of the graph
WARM_UP = 2


class EagerDecoder:
    """The plain way: exact shapes, the model's ordinary forward."""

    def __init__(self, loaded: Loaded, cache: KVCache, positions: Positions):
        self.loaded, self.cache, self.positions = loaded, cache, positions

    def decode(self, decoding: Several[Sequence]) -> torch.Tensor:
        """Feed each row, neighbours in the cache, its last token; logits [rows, vocabulary]."""
        return self.run(
            first=decoding[0].slot,
            ids=[row.output_ids[-1] for row in decoding],
            columns=[row.kv_length for row in decoding],
            plans=[row.positions for row in decoding],
        )

    def run(
        self,
        *,
        first: int,
        ids: Several[int],
        columns: Several[int],
        plans: Several[PositionPlan],
    ) -> torch.Tensor:
        """Feed ids[i] to row first + i at cache column columns[i]; logits [rows, vocabulary]."""
        device = self.loaded.device
        indices = [column - plan.prefix for column, plan in zip(columns, plans, strict=True)]
        numbers = torch.tensor([list(ids), list(columns)], device=device)
        positions = torch.tensor(self.positions.decode(plans, indices), device=device)
        rows = torch.arange(first, first + len(ids), device=device)
        with rows_of_similar_length(self.loaded, [column + 1 for column in columns]):
            return self._forward(
                numbers[0],
                numbers[1],
                positions,
                rows,
                max(columns) + 1,
                first,
                PrefixBias.of(plans, device),
            )

    def _forward(
        self,
        ids: torch.Tensor,
        columns: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        width: int,
        first: int,
        bias: PrefixBias | None,
    ) -> torch.Tensor:
        self.cache.set_decode_target(rows, columns, width, first)
        output = self.loaded.model(
            input_ids=ids[:, None],
            position_ids=self.positions.shape(positions, ids.shape[0]),
            attention_mask=decode_mask(
                columns, width, self.loaded.dtype, self.loaded.windows, bias
            ),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


@dataclass
class _Buffers:
    """Fixed inputs of one row bucket. ids, columns, prefixes, biases (as PrefixBias): [bucket];
    positions: [bucket] or [bucket, 2].
    """

    ids: torch.Tensor
    columns: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    prefixes: torch.Tensor
    biases: torch.Tensor


class StaticDecoder(EagerDecoder):
    """Padded to buckets over fixed buffers; captured and replayed when `capture` (CUDA only)."""

    def __init__(self, loaded: Loaded, cache: KVCache, positions: Positions, capture: bool):
        super().__init__(loaded, cache, positions)
        self.capture = capture
        self.buckets = [bucket for bucket in ROW_BUCKETS if bucket < cache.rows] + [cache.rows]
        self._buffers: dict[int, _Buffers] = {}
        self._graphs: dict[tuple[int, int], tuple[Any, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None

    def run(
        self,
        *,
        first: int,
        ids: Several[int],
        columns: Several[int],
        plans: Several[PositionPlan],
    ) -> torch.Tensor:
        if first:  # rows run one by one after a fault: rare, not worth a graph
            return super().run(first=first, ids=ids, columns=columns, plans=plans)
        bucket = next(bucket for bucket in self.buckets if bucket >= len(ids))
        width = min(-(-(max(columns) + 1) // WIDTH_STEP) * WIDTH_STEP, self.cache.columns)
        buffers = self._fill(bucket, ids, columns, plans)
        if not self.capture:
            return self._static_forward(buffers, width)[: len(ids)]
        if (bucket, width) not in self._graphs:
            try:
                self._graphs[bucket, width] = self._captured(buffers, width)
            except RuntimeError as error:
                # a forward that synchronises or allocates cannot be recorded
                log.warning("decoding without CUDA graphs: %s", error)
                self.capture = False
                return self._static_forward(buffers, width)[: len(ids)]
        graph, logits = self._graphs[bucket, width]
        graph.replay()
        return logits[: len(ids)].clone()

    def _fill(
        self, bucket: int, ids: Several[int], columns: Several[int], plans: Several[PositionPlan]
    ) -> _Buffers:
        device = self.loaded.device
        indices = [column - plan.prefix for column, plan in zip(columns, plans, strict=True)]
        padding = bucket - len(ids)
        positions = [*self.positions.decode(plans, indices), *[self.positions.padding] * padding]
        host = _Buffers(
            torch.tensor([*ids, *[0] * padding]),
            torch.tensor([*columns, *[self.cache.trash_column] * padding]),
            torch.tensor(positions),
            torch.arange(bucket),
            torch.tensor([*(plan.prefix for plan in plans), *[0] * padding]),
            torch.tensor([*(plan.prefix_bias for plan in plans), *[0.0] * padding]),
        )
        if bucket not in self._buffers:
            self._buffers[bucket] = _Buffers(
                *(tensor.to(device, copy=True) for tensor in vars(host).values())
            )
        buffers = self._buffers[bucket]
        for name in ("ids", "columns", "positions", "prefixes", "biases"):
            getattr(buffers, name).copy_(getattr(host, name), non_blocking=True)
        return buffers

    def _static_forward(self, buffers: _Buffers, width: int) -> torch.Tensor:
        return self._forward(
            buffers.ids,
            buffers.columns,
            buffers.positions,
            buffers.rows,
            width,
            0,
            PrefixBias(buffers.prefixes, buffers.biases),
        )

    def _captured(self, buffers: _Buffers, width: int) -> tuple[Any, torch.Tensor]:
        """Record one step. Running it more than once is harmless: it writes the same keys to the
        same columns.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._static_forward(buffers, width)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._static_forward(buffers, width)
        return graph, logits


def decoder_for(loaded: Loaded, cache: KVCache, positions: Positions) -> EagerDecoder:
    """Graphs on one CUDA device; the plain way elsewhere (a model spread over devices cannot be
    captured whole).
    """
    spread = len(set(getattr(loaded.model, "hf_device_map", {}).values())) > 1
    if loaded.device.type == "cuda" and not spread:
        return StaticDecoder(loaded, cache, positions, capture=True)
    return EagerDecoder(loaded, cache, positions)
