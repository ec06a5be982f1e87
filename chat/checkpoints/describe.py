"""What a checkpoint folder is, told from its files alone: no torch, no transformers import, so the
web tier may ask.

`fingerprint` ties adapters and runs to base weights; `describe` is what the checkpoint's page
shows.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from chat.checkpoints import adapter_files
from chat.engine.families import Family, family_of
from chat.engine.request import LIMITS

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "ice_text.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "ice_text.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
CONTEXT_NAMES = ("max_sequence_length", "max_position_embeddings", "n_positions", "seq_length")
# what a folder's generation_config.json may say in place of the engine's own defaults
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "repetition_penalty")
SAMPLES, SAMPLE_BYTES = 16, 1 << 16
# KV caches that are not plain keys and values per token cannot take a prefix.
PLAIN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class CheckpointInvalid(Exception):
    """The folder is not a checkpoint that can be loaded.

    `code`: not_a_folder | config_missing | config_invalid | unknown_model_type | remote_code_only |
    unsupported_attention | weights_missing | weights_invalid | tokenizer_missing
    """

    def __init__(self, code: str, message: str, **parameters: Any):
        super().__init__(message)
        self.code, self.message, self.parameters = code, message, parameters


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json as a dictionary, or CheckpointInvalid."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointInvalid("not_a_folder", f"{folder} is not a folder", folder=str(folder))
    path = folder / "config.json"
    if not path.is_file():  # a pipe would be read for ever
        raise CheckpointInvalid(
            "config_missing", f"{folder} has no config.json", folder=str(folder)
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointInvalid(
            "config_invalid", f"config.json cannot be read: {error}", reason=str(error)
        ) from error
    if not isinstance(config, dict):
        raise CheckpointInvalid(
            "config_invalid", "config.json is not an object", reason="not an object"
        )
    return config


def weight_files(folder: str | Path) -> list[Path]:
    """The checkpoint's weight files, one format only: safetensors where there are any, as
    transformers prefers.
    """
    folder = Path(folder)
    for pattern in WEIGHT_PATTERNS:
        found = sorted(
            path
            for path in folder.glob(pattern)
            if path.is_file() and path.name != adapter_files.WEIGHTS
        )
        if found:
            return found
    return []


def fingerprint(folder: str | Path) -> str:
    """sha256 (hex) over config.json, the tokenizer's files and, of each weight file, name, size and
    16 samples of 64 KiB.

    Sampling keeps it under a second for 13 GB; two checkpoints that differ in training differ in
    every sample.
    """
    folder = Path(folder)
    read_config(folder)
    digest = hashlib.sha256()
    for name in ("config.json", *TOKENIZER_FILES):
        path = folder / name
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= SAMPLES * SAMPLE_BYTES:
                digest.update(file.read())
            else:
                for sample in range(SAMPLES):
                    file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _family(config: dict[str, Any]) -> Family:
    """Raises CheckpointInvalid for an architecture that cannot be served."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointInvalid(
            "config_invalid", "config.json names no model_type", reason="model_type"
        )
    family = family_of(config)
    if family is None:
        if config.get("auto_map"):
            raise CheckpointInvalid(
                "remote_code_only",
                f"model type {model_type!r} can only be loaded by running code from the "
                "checkpoint's folder, "
                "which is never done here",
                model_type=model_type,
            )
        raise CheckpointInvalid(
            "unknown_model_type",
            f"{model_type!r} is not a text generation architecture that is known here",
            model_type=model_type,
        )
    unusual = set(config.get("layer_types") or []) - PLAIN_LAYERS
    if unusual:
        raise CheckpointInvalid(
            "unsupported_attention",
            f"layers of kind {', '.join(sorted(unusual))} keep no keys and values per token, so "
            "no prefix fits before them",
            layers=", ".join(sorted(unusual)),
        )
    return family


def _safetensors_parameters(path: Path) -> int:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= path.stat().st_size:
            raise ValueError("not a safetensors file")
        header = json.loads(file.read(length))
    return sum(
        math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
    )


def _parameters(files: list[Path], dtype: str) -> int | None:
    if files[0].suffix == ".safetensors":
        total = 0
        for path in files:
            try:
                total += _safetensors_parameters(path)
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                RecursionError,
            ) as error:
                raise CheckpointInvalid(
                    "weights_invalid",
                    f"{path.name} is not a readable safetensors file: {error}",
                    file=path.name,
                ) from error
        return total
    width = {"float16": 2, "bfloat16": 2, "float32": 4}.get(dtype)
    return sum(path.stat().st_size for path in files) // width if width else None


def describe(folder: str | Path) -> dict[str, Any]:
    """family, architecture, layers, hidden_size, vocabulary, context_length, parameters, dtype,
    quantization_bit, bytes, sampling, note.

    `parameters` counts stored numbers (packed ones as stored), `None` if unknown. Raises
    CheckpointInvalid.
    """
    folder = Path(folder)
    config = read_config(folder)
    family = _family(config)
    files = weight_files(folder)
    if not files:
        raise CheckpointInvalid(
            "weights_missing", f"{folder} holds no weight files", folder=str(folder)
        )
    empty = [path.name for path in files if path.stat().st_size < 1024]
    if empty:
        raise CheckpointInvalid(
            "weights_invalid",
            f"{empty[0]} is a Git LFS pointer or empty, not weights: fetch the real file (git lfs "
            "pull)",
            file=empty[0],
        )
    _check_shards(folder, files)
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise CheckpointInvalid(
            "tokenizer_missing", f"{folder} holds no tokenizer", folder=str(folder)
        )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    quantization = config.get("quantization_bit") or (config.get("quantization_config") or {}).get(
        "bits"
    )
    contexts = (config.get(name) for name in CONTEXT_NAMES)
    return {
        "family": family.name,
        "architecture": (config.get("architectures") or [config["model_type"]])[0],
        "layers": config.get("num_hidden_layers")
        or config.get("num_layers")
        or config.get("n_layer"),
        "hidden_size": config.get("hidden_size") or config.get("n_embd"),
        "vocabulary": config.get("vocab_size"),
        "context_length": next((length for length in contexts if length), None),
        "parameters": None
        if quantization and files[0].suffix == ".bin"
        else _parameters(files, dtype),
        "dtype": dtype,
        "quantization_bit": int(quantization) if quantization else None,
        "bytes": sum(path.stat().st_size for path in files),
        "sampling": _sampling(folder),
        "note": str(config.get("portal_note", "")),
    }


def _sampling(folder: Path) -> dict[str, float]:
    """How the model wants to be sampled, from generation_config.json; what is no sensible value
    there is passed over.
    """
    try:
        told = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        return {
            name: told[name]
            for name in SAMPLING_DEFAULTS
            if type(told.get(name)) in (LIMITS[name].kind, int) and told[name] in LIMITS[name]
        }
    except (OSError, ValueError, AttributeError, RecursionError):
        # most folders have such a file, none needs it
        return {}


def _check_shards(folder: Path, files: list[Path]) -> None:
    """Every shard that the index names must be there."""
    suffix = "model.safetensors" if files[0].suffix == ".safetensors" else "pytorch_model.bin"
    index = folder / f"{suffix}.index.json"
    if not index.is_file():
        return
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointInvalid(
            "weights_invalid", f"{index.name} cannot be read", file=index.name
        ) from error
    missing = sorted(named - {path.name for path in files})
    if missing:
        raise CheckpointInvalid(
            "weights_missing",
            f"{len(missing)} weight files are missing, the first is {missing[0]}",
            folder=str(folder),
        )
