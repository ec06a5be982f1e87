"""Prefixes that people already have, in and out: folders of ChatGLM-6B's own ptuning scripts and of
peft (docs/chatglm.md#9-prefix).

Both lay a prefix out alike: one row per prefix token, and in it layer after layer the key, then the
value, head after head: [P, layers * 2 * kv_heads * head_dim].
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chat.checkpoints.adapter_files import (
    PEFT_CONFIG,
    PEFT_TENSOR,
    PEFT_WEIGHTS,
    frozen_tokens,
    peft_config,
)
from chat.engine.adapters import AdapterInvalid, KVPrefix

_LARGEST_JSON = 64 * 1024 * 1024  # bytes
_ENCODER = "prefix_encoder."
_ORIGINAL_KEY = "transformer.prefix_encoder.embedding.weight"
# Where weights may lie, in the order of preference; an index comes before the single file of the
# same kind.
_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class BaseShape:
    """The part of a base model's shape that a prefix must fit."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Numbers per prefix token."""
        return self.layers * 2 * self.kv_heads * self.head_dim

    def __str__(self) -> str:
        heads = f"{self.kv_heads} x {self.head_dim}"
        return f"{self.layers} layers of {heads}, {self.width} numbers a prefix token"


def read_prefix(
    folder: str | Path,
    base: BaseShape,
    *,
    checkpoint_fingerprint: str = "",
    shifts_positions: bool = False,
) -> KVPrefix:
    """Read a `checkpoint-N/` folder of the original (prefix only, or an old one that holds the
    whole model) or a peft folder.

    The length P and whether there is a projection follow from the tensors; a projection is applied
    once and for all. Raises AdapterInvalid, naming both sides, when the tensors do not fit `base`
    or contradict the folder's config.json.
    """
    folder = Path(folder)
    is_peft = (folder / PEFT_CONFIG).is_file()
    flat, details = _read_peft(folder) if is_peft else _read_original(folder)
    if flat.dim() != 2 or flat.shape[1] != base.width or not len(flat):
        raise AdapterInvalid(
            f"the prefix in {folder.name} has shape {list(flat.shape)}; the checkpoint has "
            f"{base}, so it needs "
            f"[P, {base.width}]"
        )
    split = flat.float().view(len(flat), base.layers, 2, base.kv_heads, base.head_dim)
    return KVPrefix(
        tensor=split.permute(1, 2, 3, 0, 4).contiguous(),
        shifts_positions=shifts_positions,
        checkpoint_fingerprint=checkpoint_fingerprint,
        metadata={**details, "imported_from": folder.name, "pre_seq_len": len(flat)},
    )


def flatten(prefix: KVPrefix) -> Tensor:
    """[P, layers * 2 * kv_heads * head_dim] in fp32: the row layout of both formats."""
    return prefix.tensor.detach().cpu().float().permute(3, 0, 1, 2, 4).flatten(1).contiguous()


def write_original(
    prefix: KVPrefix, folder: str | Path, base_config: Mapping[str, Any] | None = None
) -> Path:
    """Write what the original's scripts load as `--ptuning_checkpoint` (with --pre_seq_len P,
    without projection).

    base_config: the checkpoint's config.json, repeated with pre_seq_len and prefix_projection as
    the original saves it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = flatten(prefix)
    torch.save({_ORIGINAL_KEY: flat}, folder / "pytorch_model.bin")
    config = {
        **(base_config or {"model_type": "chatglm"}),
        "pre_seq_len": len(flat),
        "prefix_projection": False,
    }
    _write_json(folder / "config.json", config)
    return folder


def write_peft(
    prefix: KVPrefix, folder: str | Path, base_model: str = "", *, cartridge: bool = False
) -> Path:
    """Write a folder for peft's PeftModel.from_pretrained, as PREFIX_TUNING or CARTRIDGE.
    base_model: the name peft is to remember.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({PEFT_TENSOR: flatten(prefix)}, folder / PEFT_WEIGHTS)
    frozen = frozen_tokens(prefix.metadata) if cartridge else None
    _write_json(folder / PEFT_CONFIG, peft_config(prefix.tensor.shape, base_model, frozen))
    return folder


def _read_original(folder: Path) -> tuple[Tensor, dict[str, Any]]:
    tensors = {
        name.partition(_ENCODER)[2]: value
        for name, value in _tensors(folder, lambda name: _ENCODER in name).items()
    }
    if "embedding.weight" not in tensors:
        raise AdapterInvalid(
            f"{folder.name} holds no {_ORIGINAL_KEY}: it is not a P-tuning checkpoint"
        )
    embedding = tensors["embedding.weight"].float()
    projection = "trans.0.weight" in tensors
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    stated = {
        "pre_seq_len": config.get("pre_seq_len"),
        "prefix_projection": config.get("prefix_projection"),
    }
    held = {"pre_seq_len": len(embedding), "prefix_projection": projection}
    wrong = [name for name, value in stated.items() if value is not None and value != held[name]]
    if wrong:
        sides = "; ".join(
            f"config.json says {name} {stated[name]}, its tensors have {held[name]}"
            for name in wrong
        )
        raise AdapterInvalid(f"{folder.name}: {sides}")
    if projection:
        embedding = _project(embedding, tensors, folder)
    return embedding, {"format": "ptuning", "prefix_projection": projection}


def _project(embedding: Tensor, tensors: dict[str, Tensor], folder: Path) -> Tensor:
    """Linear, Tanh, Linear: what the prefix encoder does before every forward, and always with the
    same result.
    """
    try:
        first, first_bias, second, second_bias = (
            tensors[name].float()
            for name in ("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")
        )
        return torch.tanh(embedding @ first.T + first_bias) @ second.T + second_bias
    except KeyError as error:
        raise AdapterInvalid(f"{folder.name}: the projection lacks {error.args[0]}") from error
    except RuntimeError as error:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise AdapterInvalid(
            f"{folder.name}: the projection's shapes do not fit together: {shapes}"
        ) from error


def _read_peft(folder: Path) -> tuple[Tensor, dict[str, Any]]:
    config = _json(folder / PEFT_CONFIG)
    kind = config.get("peft_type")
    if kind not in ("PREFIX_TUNING", "CARTRIDGE"):
        raise AdapterInvalid(
            f"{folder.name} is a peft {kind} adapter; a prefix is PREFIX_TUNING or CARTRIDGE"
        )
    for name in (PEFT_WEIGHTS, "adapter_model.bin"):
        if (folder / name).is_file():
            tensors = _tensors_of(folder / name, lambda key: PEFT_TENSOR in key)
            break
    else:
        raise AdapterInvalid(f"{folder.name} has an {PEFT_CONFIG}, but no {PEFT_WEIGHTS}")
    if len(tensors) != 1:
        raise AdapterInvalid(f"{folder.name} holds no {PEFT_TENSOR}")
    (flat,) = tensors.values()
    if config.get("num_virtual_tokens") not in (None, len(flat)):
        raise AdapterInvalid(
            f"{folder.name}: {PEFT_CONFIG} says num_virtual_tokens "
            f"{config['num_virtual_tokens']}, "
            f"its tensor has {len(flat)}"
        )
    details = {"format": "peft", "prefix_projection": bool(config.get("prefix_projection"))}
    if kind == "CARTRIDGE":
        frozen = config.get("num_frozen_tokens", 1)
        if isinstance(frozen, bool) or not isinstance(frozen, int) or not 0 <= frozen <= len(flat):
            raise AdapterInvalid(
                f"{folder.name}: {PEFT_CONFIG} says num_frozen_tokens {frozen!r}, its tensor has "
                f"{len(flat)} positions"
            )
        details["num_frozen_tokens"] = frozen
    return flat, details


def _tensors(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder whose names `wanted` accepts; only the files that hold
    them are opened.
    """
    for name in _WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".json"):
            return _tensors_of(path, wanted)
        files = sorted({file for key, file in _weight_map(path).items() if wanted(key)})
        return {
            key: value
            for file in files
            for key, value in _tensors_of(folder / file, wanted).items()
        }
    raise AdapterInvalid(
        f"{folder.name} holds no weights: none of {', '.join(_WEIGHT_FILES)} is there"
    )


def _weight_map(path: Path) -> dict[str, str]:
    """{name of a tensor: the file beside `path` that holds it}."""
    held = _json(path).get("weight_map")
    if not isinstance(held, dict):
        raise AdapterInvalid(f"{path.name} has no weight_map")
    for file in held.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise AdapterInvalid(f"{path.name} names {file!r}, which is no file beside it")
    return held


def _tensors_of(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    try:
        with path.open("rb") as start:
            if start.read(24) == b"version https://git-lfs.":
                raise AdapterInvalid(
                    f"{path.name} is a Git LFS pointer, not weights: fetch the real file with "
                    "git lfs pull"
                )
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
            return _checked(found, path)
        # mmap: of an old checkpoint with the whole model in it, only the prefix is read
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if isinstance(content, Tensor):
            raise AdapterInvalid(
                f"{path.name} holds a bare tensor {list(content.shape)}: save it under its name, "
                f'as {{"{_ORIGINAL_KEY}": tensor}}'
            )
        if not isinstance(content, Mapping):
            raise AdapterInvalid(f"{path.name} holds a {type(content).__name__}, no named tensors")
        named = {name: each for name, each in content.items() if isinstance(name, str)}
        found = {name: each for name, each in named.items() if wanted(name)}
        return {name: each.clone() for name, each in _checked(found, path).items()}
    except (
        OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError, AttributeError,
        SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AdapterInvalid(f"{path.name} cannot be read: {reason}") from error


def _checked(found: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """`found`, when all of it is tensors of finite numbers."""
    for name, each in found.items():
        if not isinstance(each, Tensor):
            raise AdapterInvalid(f"{path.name}: {name} is a {type(each).__name__}, no tensor")
        if not each.is_floating_point() or each.layout != torch.strided or each.is_quantized:
            raise AdapterInvalid(f"{path.name}: {name} is of the type {each.dtype}")
        if not each.dim():
            raise AdapterInvalid(f"{path.name}: {name} is one number")
        if not torch.isfinite(each).all():
            raise AdapterInvalid(f"{path.name}: {name} holds numbers that are not finite")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise AdapterInvalid(f"{path.name} has more than {_LARGEST_JSON} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise AdapterInvalid(f"{path.name} is not a JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
