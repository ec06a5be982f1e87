"""A learned KV prefix (P-tuning v2, prefix tuning) in front of any request to vLLM: a KV connector.

A request carries P placeholder ids before its prompt, `kv_transfer_params={"prefix": NAME,
"length": P}` and `cache_salt=NAME`; NAME is the sha256 (hex) of the prefix's file. For the
placeholders the connector writes the learned keys and values into the paged cache; they are never
computed. vLLM's own prefix cache knows them by placeholder ids and salt, so all requests of one
prefix share one copy of its full blocks. P may be any number: of a last, partial block every
request has a copy of its own.

A prefix that cannot be loaded fails its request (`kv_load_failure_policy` must be "fail": vLLM
would else compute the placeholders as if they were text and answer without the prefix). Written for
vLLM 0.32; the interface is called experimental there.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

logger = init_logger(__name__)

FILE, TENSOR = "adapter.safetensors", "prefix"
HOST_BYTES = 1 << 30  # of prefixes kept in memory
_NAME = re.compile(r"[0-9a-f]{64}")


class PrefixInvalid(Exception):
    """The request's prefix cannot be put into the cache; its request fails."""


@dataclass(frozen=True)
class Load:
    """Tokens `start` to `stop` of the prefix `name`, to be written into the blocks that hold a
    request's first tokens.

    problem: why the request must fail instead, or "".
    """

    name: str
    length: int
    start: int
    stop: int
    block_ids: tuple[int, ...]
    problem: str = ""


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler tells the workers each step."""

    loads: list[Load] = field(default_factory=list)


class PrefixConnector(KVConnectorBase_V1):
    """`--kv-transfer-config` names this class and gives `folder` in kv_connector_extra_config.

    folder: FOLDER/<sha256>/adapter.safetensors holds one tensor "prefix" of [layers, 2 (key,
    value), kv_heads, P, head_dim]; keys are not rotated, the prompt's first position is P (peft's
    rule). Files may be added while the server runs.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        config = self._kv_transfer_config
        folder = config.get_from_extra_config("folder", "")
        if not folder or not Path(folder).is_dir():
            raise ValueError(
                f"PrefixConnector needs kv_connector_extra_config.folder; {folder!r} is not a "
                "folder"
            )
        if config.kv_load_failure_policy != "fail":
            raise ValueError(
                'PrefixConnector needs kv_load_failure_policy "fail": with any other, '
                "answers would silently lack the prefix"
            )
        if len(kv_cache_config.kv_cache_groups) > 1:
            raise ValueError(
                "PrefixConnector serves models with one kind of KV cache; this one mixes several"
            )
        self._block_size = vllm_config.cache_config.block_size
        self._layers = vllm_config.model_config.get_total_num_hidden_layers()
        self._prefixes = _Prefixes(Path(folder), vllm_config.model_config.dtype)
        self._planned: list[Load] = []
        self._failed_blocks: set[int] = set()

    # -- scheduler

    def on_new_request(self, request: Any) -> None:
        """vLLM asks no connector for a request with prompt_logprobs; one that also wants a prefix
        must come by, to fail.
        """
        if _Wish.of(request) is not None:
            request.skip_reading_prefix_cache = False

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Placeholders that are not in vLLM's own cache. Asked again after a preemption."""
        wish = _Wish.of(request)
        if wish is None:
            return 0, False
        # One that must fail claims a token, so that there is a load that can fail.
        missing = 1 if wish.problem else max(0, wish.length - num_computed_tokens)
        if num_computed_tokens + missing >= request.num_tokens:
            # No token is left to fail with: it is never scheduled, until its client gives up.
            return None, False
        return missing, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        wish = _Wish.of(request)
        if wish is None or num_external_tokens == 0:
            return
        (block_ids,) = blocks.get_block_ids()
        stop = wish.length
        start = stop - num_external_tokens
        if wish.problem:
            start, stop = 0, len(block_ids) * self._block_size
        self._planned.append(
            Load(wish.name, wish.length, start, stop, tuple(block_ids), wish.problem)
        )

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        planned, self._planned = self._planned, []
        return Loads(planned)

    # -- worker

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Before the forward: what it attends to must be there."""
        for load in self._get_connector_metadata().loads:
            try:
                if load.problem:
                    raise PrefixInvalid(load.problem)
                self._write(load, forward_context)
            except PrefixInvalid as error:
                logger.error("A request for the prefix %.12s fails: %s", load.name, error)
                first, last = load.start // self._block_size, -(-load.stop // self._block_size)
                self._failed_blocks.update(load.block_ids[first:last])

    def _write(self, load: Load, forward_context: Any) -> None:
        tensor = self._prefixes.get(load.name)
        layers = [
            (extract_layer_index(name), layer)
            for name, layer in forward_context.no_compile_layers.items()
            if getattr(layer, "kv_cache", None) is not None
        ]
        self._check_shape(load, tensor, layers)
        positions = torch.arange(load.start, load.stop)
        blocks = torch.tensor(load.block_ids)[positions // self._block_size]
        slots = blocks * self._block_size + positions % self._block_size
        heads = _heads_of_this_rank(tensor.shape[2])
        for index, layer in layers:
            cache = layer.kv_cache
            # [tokens, heads, head_dim], as the layer hands them over; how a backend packs its cache
            # is its own business.
            keys, values = (
                part.transpose(0, 1).contiguous().to(cache.device)
                for part in tensor[index, :, heads, load.start : load.stop]
            )
            layer.impl.do_kv_cache_update(layer, keys, values, cache, slots.to(cache.device))

    def _check_shape(self, load: Load, tensor: torch.Tensor, layers: list[tuple[int, Any]]) -> None:
        has, ranks = list(tensor.shape), get_tensor_model_parallel_world_size()
        for _, layer in layers:
            needed = [self._layers, 2, "kv_heads", load.length, layer.head_size]
            fits = len(has) == 5 and has[:2] + has[3:] == needed[:2] + needed[3:]
            if not fits or max(1, has[2] // ranks) != layer.num_kv_heads:
                raise PrefixInvalid(
                    f"its tensor is {has}, needed is {needed} with {layer.num_kv_heads} kv_heads "
                    f"on each of {ranks} ranks"
                )

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything is there when the forward begins."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Prefixes are only read."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


@dataclass(frozen=True)
class _Wish:
    name: str
    length: int
    problem: str = ""

    @classmethod
    def of(cls, request: Any) -> _Wish | None:
        """What the request says of a prefix; None when it wants none."""
        fields = request.kv_transfer_params or {}
        if "prefix" not in fields:
            return None
        name, length = fields["prefix"], fields.get("length")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            return cls(str(name), 0, "kv_transfer_params.prefix is a sha256 in hex")
        if type(length) is not int or not 0 < length < request.num_prompt_tokens:
            return cls(
                name,
                0,
                "kv_transfer_params.length is the number of placeholders before the prompt, not "
                f"{length!r}",
            )
        if request.cache_salt != name:
            return cls(
                name,
                length,
                "cache_salt must be the prefix's name, or another's keys could be taken from the "
                "cache",
            )
        if request.sampling_params is None or request.sampling_params.prompt_logprobs is not None:
            return cls(
                name, length, "a prefix goes before a text to be continued, without prompt_logprobs"
            )
        return cls(name, length)


class _Prefixes:
    """Prefixes by name, checked once and kept in the model's dtype; the least recently used ones
    are dropped.
    """

    def __init__(self, folder: Path, dtype: torch.dtype):
        self._folder, self._dtype = folder, dtype
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def get(self, name: str) -> torch.Tensor:
        """[layers, 2, kv_heads, P, head_dim] in host memory. PrefixInvalid."""
        if name not in self._kept:
            self._kept[name] = self._read(name)
        self._kept.move_to_end(name)
        while (
            len(self._kept) > 1
            and sum(tensor.nbytes for tensor in self._kept.values()) > HOST_BYTES
        ):
            self._kept.popitem(last=False)
        return self._kept[name]

    def _read(self, name: str) -> torch.Tensor:
        try:
            content = (self._folder / name / FILE).read_bytes()
            if hashlib.sha256(content).hexdigest() != name:
                raise PrefixInvalid(f"{FILE} has another content than its name says")
            tensor = load_safetensors(content)[TENSOR].to(self._dtype)
        except (OSError, SafetensorError, KeyError) as error:
            raise PrefixInvalid(f"{FILE} cannot be read: {error!r}") from error
        if not torch.isfinite(tensor).all():
            raise PrefixInvalid(f"it holds numbers that are not finite in {self._dtype}")
        return tensor


def _heads_of_this_rank(heads: int) -> slice:
    """Under tensor parallelism a rank holds a share of the heads, or, with more ranks than heads, a
    copy of one.
    """
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    if heads < ranks:
        return slice(first := rank // (ranks // heads), first + 1)
    share = heads // ranks
    return slice(rank * share, (rank + 1) * share)
