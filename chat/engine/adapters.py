"""A tuned artefact as the engine sees it: a KV prefix, and the pool that keeps many of them at
hand.

P-tuning v2 learns `pre_seq_len` key and value vectors per layer
(docs/chatglm.md#9-prefix). Serving needs nothing else of a run, so an adapter is one
tensor in `adapter.safetensors` beside a small `adapter.json`, whatever trained it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from chat.checkpoints.adapter_files import DESCRIPTION, TENSOR, WEIGHTS
from chat.engine.request import AdapterRef, RequestRefused

if TYPE_CHECKING:
    from chat.engine.loading import Loaded

FORMAT = 1


class AdapterInvalid(Exception):
    """The folder holds no adapter that fits. The message names both sides: what was found and what
    is needed.
    """

    code = "invalid_adapter"


@dataclass
class KVPrefix:
    """Learned keys and values that stand before the prompt.

    tensor: [layers, 2, kv_heads, pre_seq_len, head_dim]; index 0 of dimension 1 is the key (never
    rotated), 1 the value. shifts_positions: True where the prompt's first position is pre_seq_len
    (peft's rule), False where it stays 0 (ChatGLM). checkpoint_fingerprint: of the base weights it
    was trained on (chat.checkpoints.describe); "" fits any of equal shape.
    """

    tensor: torch.Tensor
    shifts_positions: bool
    checkpoint_fingerprint: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def pre_seq_len(self) -> int:
        return self.tensor.shape[3]


def _replace(path: Path, write: Callable[[str], object]) -> None:
    """Let `write(temporary path)` make the file, then move it into place in one step."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save(prefix: KVPrefix, folder: str | Path) -> str:
    """Write the adapter into `folder` (made if missing); return the sha256 of adapter.safetensors,
    in hex.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if prefix.tensor.dim() != 5 or prefix.tensor.shape[1] != 2:
        raise AdapterInvalid(
            "a KV prefix is [layers, 2, kv_heads, pre_seq_len, head_dim], this one is "
            f"{list(prefix.tensor.shape)}"
        )
    layers, _, kv_heads, pre_seq_len, head_dim = prefix.tensor.shape
    tensor = prefix.tensor.detach().to("cpu").contiguous()
    _replace(folder / WEIGHTS, lambda path: save_file({TENSOR: tensor}, path))
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    description = {
        "format": FORMAT,
        "layers": layers,
        "kv_heads": kv_heads,
        "pre_seq_len": pre_seq_len,
        "head_dim": head_dim,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shifts_positions": prefix.shifts_positions,
        "checkpoint_fingerprint": prefix.checkpoint_fingerprint,
        "sha256": digest,
        "metadata": prefix.metadata,
    }
    text = json.dumps(description, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    _replace(folder / DESCRIPTION, lambda path: Path(path).write_text(text, encoding="utf-8"))
    return digest


def load(folder: str | Path) -> KVPrefix:
    """Read what `save` wrote. Raises AdapterInvalid when a file is missing, unreadable or says
    other shapes than it holds.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise AdapterInvalid(
            f"{folder} is not an adapter: {Path(error.filename or '').name} is missing"
        ) from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise AdapterInvalid(f"the adapter in {folder} cannot be read: {error}") from error
    if not isinstance(description, dict) or TENSOR not in tensors:
        raise AdapterInvalid(
            f"{folder} holds tensors {sorted(tensors)}, an adapter holds '{TENSOR}'"
        )
    tensor = tensors[TENSOR]
    names = ("layers", "kv_heads", "pre_seq_len", "head_dim")
    said = [description.get(name) for name in names]
    held = (
        [tensor.shape[i] for i in (0, 2, 3, 4)]
        if tensor.dim() == 5 and tensor.shape[1] == 2
        else list(tensor.shape)
    )
    if said != held:
        raise AdapterInvalid(
            f"{DESCRIPTION} says {dict(zip(names, said, strict=True))}, the tensor has {held}"
        )
    metadata = description.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise AdapterInvalid(f"{DESCRIPTION} has no metadata but a {type(metadata).__name__}")
    return KVPrefix(
        tensor=tensor,
        shifts_positions=bool(description.get("shifts_positions", True)),
        checkpoint_fingerprint=str(description.get("checkpoint_fingerprint", "")),
        metadata=dict(metadata),
    )


def check(prefix: KVPrefix, loaded: Loaded) -> None:
    """Refuse an adapter that does not fit the loaded checkpoint (chat.engine.loading.Loaded),
    naming both sides.
    """
    layers, _, kv_heads, _, head_dim = prefix.tensor.shape
    has = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
    needs = {"layers": loaded.layers, "kv_heads": loaded.kv_heads, "head_dim": loaded.head_dim}
    if has != needs:
        raise RequestRefused(
            "invalid_adapter",
            f"the adapter was made for {has}, the checkpoint has {needs}",
            param="adapter",
        )
    if prefix.shifts_positions != loaded.shifts_positions:
        raise RequestRefused(
            "invalid_adapter",
            f"the adapter's position rule (shifts_positions={prefix.shifts_positions}) is not the "
            "checkpoint's "
            f"(shifts_positions={loaded.shifts_positions})",
            param="adapter",
        )
    if prefix.checkpoint_fingerprint and prefix.checkpoint_fingerprint != loaded.fingerprint:
        raise RequestRefused(
            "invalid_adapter",
            f"the adapter was trained on checkpoint {prefix.checkpoint_fingerprint[:12]}, "
            f"loaded is {loaded.fingerprint[:12]}",
            param="adapter",
        )
    if not torch.isfinite(prefix.tensor).all():
        raise RequestRefused(
            "invalid_adapter",
            "the adapter holds values that are not finite numbers",
            param="adapter",
        )


@dataclass
class _Resident:
    host: torch.Tensor
    device: torch.Tensor | None


class AdapterPool:
    """Every adapter in use: a copy in host memory (pinned when the model is on a GPU), the hot ones
    on the device.

    Both tiers are bounded in bytes and drop the least recently used. `fetch` may run on any thread
    and may read the disk; `on_device` belongs to the engine's thread and only copies.
    """

    def __init__(self, loaded: Loaded, device_bytes: int = 3 << 30, host_bytes: int = 16 << 30):
        self._loaded = loaded
        self._device_bytes, self._host_bytes = device_bytes, host_bytes
        self._entries: OrderedDict[str, _Resident] = OrderedDict()
        self._lock = threading.Lock()
        self._device = torch.device(loaded.device)

    def fetch(self, ref: AdapterRef) -> torch.Tensor:
        """The adapter's host tensor, in the model's dtype. Raises RequestRefused("invalid_adapter")
        if it does not fit.
        """
        with self._lock:
            entry = self._entries.get(ref.name)
            if entry is not None:
                self._entries.move_to_end(ref.name)
                return entry.host
        try:
            prefix = load(ref.folder)
        except AdapterInvalid as error:
            raise RequestRefused("invalid_adapter", str(error), param="adapter") from error
        check(prefix, self._loaded)
        host = prefix.tensor.to(self._loaded.dtype)
        if self._device.type == "cuda":
            host = host.pin_memory()
        return self._put(ref.name, host)

    def _put(self, name: str, host: torch.Tensor) -> torch.Tensor:
        """The tensor that is kept: the first, where several threads have read the same files."""
        with self._lock:
            on_device = host if self._device.type == "cpu" else None
            entry = self._entries.setdefault(name, _Resident(host, on_device))
            self._entries.move_to_end(name)
            while len(self._entries) > 1 and self._bytes("host") > self._host_bytes:
                self._entries.popitem(last=False)
            return entry.host

    def on_device(self, name: str, host: torch.Tensor) -> torch.Tensor:
        """The adapter on the model's device; a cold one is copied from pinned memory without
        waiting for the copy.
        """
        if self._device.type == "cpu":
            return host
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                entry = self._entries[name] = _Resident(host, None)
            self._entries.move_to_end(name)
            if entry.device is None:
                entry.device = host.to(self._device, non_blocking=True)
                for other_name, other in self._entries.items():
                    if self._bytes("device") <= self._device_bytes:
                        break
                    if other_name != name:
                        other.device = None
            return entry.device

    def _bytes(self, tier: str) -> int:
        tensors = [getattr(entry, tier) for entry in self._entries.values()]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def status(self) -> dict[str, Any]:
        with self._lock:
            resident = [name for name, entry in self._entries.items() if entry.device is not None]
            return {
                "known": len(self._entries),
                "resident": resident,
                "device_bytes": self._bytes("device"),
                "host_bytes": self._bytes("host"),
            }
