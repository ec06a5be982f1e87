"""What a checkpoint folder is, told from its files alone: no torch, no transformers import, so the
web tier may ask.

`fingerprint` ties adapters and runs to base weights; `describe` is what the checkpoint's page
shows.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from chat.checkpoints import adapter_files, provenance
from chat.checkpoints.layers import unusual_layers
from chat.checkpoints.safe_files import (
    UnsafeFile,
    file_sizes,
    open_inside,
    read_json_inside,
)
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
# Largest files of each kind in bytes, far above any real one, low enough to be read in a second.
CONFIG_BYTES, JSON_BYTES, TOKENIZER_BYTES = 4 << 20, 16 << 20, 64 << 20


class CheckpointInvalid(Exception):
    """The folder is not a checkpoint that can be loaded.

    `code`: not_a_folder | config_missing | config_invalid | unknown_model_type | remote_code_only |
    unsupported_attention | weights_missing | weights_invalid | tokenizer_missing | unsafe_file
    """

    def __init__(self, code: str, message: str, **parameters: Any):
        super().__init__(message)
        self.code, self.message, self.parameters = code, message, parameters


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json as a dictionary, or CheckpointInvalid."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointInvalid("not_a_folder", f"{folder} is not a folder", folder=str(folder))
    try:
        config = read_json_inside(folder, "config.json", CONFIG_BYTES)
    except FileNotFoundError as error:
        raise CheckpointInvalid(
            "config_missing", f"{folder} has no config.json", folder=str(folder)
        ) from error
    except UnsafeFile as error:
        raise _unsafe(error) from error
    except (OSError, ValueError) as error:
        raise CheckpointInvalid(
            "config_invalid", f"config.json cannot be read: {error}", reason=str(error)
        ) from error
    if not isinstance(config, dict):
        raise CheckpointInvalid(
            "config_invalid", "config.json is not an object", reason="not an object"
        )
    return config


def _unsafe(error: UnsafeFile) -> CheckpointInvalid:
    return CheckpointInvalid("unsafe_file", str(error), file=error.name, reason=error.reason)


def weight_files(folder: str | Path) -> list[Path]:
    """The checkpoint's weight files, one format only: safetensors where there are any, as
    transformers prefers.
    """
    folder = Path(folder)
    try:
        names = sorted(file_sizes(folder))
    except UnsafeFile as error:
        raise _unsafe(error) from error
    for pattern in WEIGHT_PATTERNS:
        found = [
            folder / name
            for name in names
            if fnmatch.fnmatchcase(name, pattern) and name != adapter_files.WEIGHTS
        ]
        if found:
            return found
    return []


def fingerprint(folder: str | Path) -> str:
    """sha256 (hex) over config.json, the tokenizer's files and, of each weight file, name, size and
    16 samples of 64 KiB.

    Sampling keeps it under a second for 13 GB; two checkpoints that differ in training differ in
    every sample. Raises CheckpointInvalid.
    """
    folder = Path(folder)
    read_config(folder)
    digest = hashlib.sha256()
    try:
        for name in ("config.json", *TOKENIZER_FILES):
            _digest_whole(folder, name, digest)
        for path in weight_files(folder):
            _digest_samples(folder, path.name, digest)
    except UnsafeFile as error:
        raise _unsafe(error) from error
    return digest.hexdigest()


def _digest_whole(folder: Path, name: str, digest: Any) -> None:
    try:
        file = open_inside(folder, name)
    except FileNotFoundError:
        return
    with file:
        size = os.fstat(file.fileno()).st_size
        if size > TOKENIZER_BYTES:
            raise UnsafeFile(name, f"has more than {TOKENIZER_BYTES} bytes")
        digest.update(f"{name}\0{size}\0".encode())
        while chunk := file.read(1 << 20):
            digest.update(chunk)


def _digest_samples(folder: Path, name: str, digest: Any) -> None:
    with open_inside(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{name}\0{size}\0".encode())
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read(size))
            return
        for sample in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))


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
                "checkpoint's folder, which is never done here; a version of it in the format of "
                "Llama, Qwen or another architecture of transformers loads",
                model_type=model_type,
            )
        raise CheckpointInvalid(
            "unknown_model_type",
            f"{model_type!r} is not a text generation architecture that is known here",
            model_type=model_type,
        )
    unusual = unusual_layers(config)
    if unusual:
        raise CheckpointInvalid(
            "unsupported_attention",
            f"{model_type!r} has layers of a kind that takes no prefix ({', '.join(unusual)}): it "
            "cannot be tuned here; a vLLM server serves it untuned (manage.py vllm_command)",
            layers=", ".join(unusual),
            model_type=model_type,
        )
    return family


def _safetensors_parameters(path: Path) -> int:
    """Numbers stored in one file, from its header, which must account for every byte of it."""
    with open_inside(path.parent, path.name) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size, JSON_BYTES):
            raise ValueError("not a safetensors file")
        header = json.loads(file.read(length))
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    end = max((entry["data_offsets"][1] for entry in tensors), default=0)
    if size != 8 + length + end:
        raise ValueError(f"{size} bytes instead of {8 + length + end}: cut off, or another file")
    return sum(math.prod(entry["shape"]) for entry in tensors)


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
                IndexError,
                RecursionError,
                UnsafeFile,
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
    """family, architecture, layers, hidden_size, intermediate_size, heads, kv_heads, head_dim,
    vocabulary, context_length, parameters, dtype, quantization_bit, bytes, sampling, note,
    chat_template (whether it has one), thinking ("switch": may be asked to, or not to, think before
    it answers; "always"; ""), licence ("" = not said), source (source.json, or {}).

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
    _check_plain(folder)
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise CheckpointInvalid(
            "tokenizer_missing", f"{folder} holds no tokenizer", folder=str(folder)
        )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    quantization = config.get("quantization_bit") or (config.get("quantization_config") or {}).get(
        "bits"
    )
    contexts = (config.get(name) for name in CONTEXT_NAMES)
    source, template = provenance.source(folder), _chat_template(folder)
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
        **_attention_shape(config),
        "chat_template": family.name == "chatglm" or bool(template),
        "thinking": _thinking(template),
        "source": source,
        "licence": str(source.get("licence") or "") or provenance.licence(folder),
        "note": str(config.get("portal_note", "")),
    }


def _check_plain(folder: Path) -> None:
    """Whatever the loader will read must be a plain file of a bearable size: it reads without
    looking.
    """
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        try:
            with open_inside(folder, name) as file:
                if os.fstat(file.fileno()).st_size > TOKENIZER_BYTES:
                    raise UnsafeFile(name, f"has more than {TOKENIZER_BYTES} bytes")
        except FileNotFoundError:
            continue
        except UnsafeFile as error:
            raise _unsafe(error) from error


def _sampling(folder: Path) -> dict[str, float]:
    """How the model wants to be sampled, from generation_config.json; what is no sensible value
    there is passed over.
    """
    try:
        told = read_json_inside(folder, "generation_config.json", CONFIG_BYTES)
        return {
            name: told[name]
            for name in SAMPLING_DEFAULTS
            if type(told.get(name)) in (LIMITS[name].kind, int) and told[name] in LIMITS[name]
        }
    except (OSError, ValueError, AttributeError, UnsafeFile):
        # most folders have such a file, none needs it
        return {}


def _check_shards(folder: Path, files: list[Path]) -> None:
    """Every shard that the index names must be there."""
    suffix = "model.safetensors" if files[0].suffix == ".safetensors" else "pytorch_model.bin"
    index = folder / f"{suffix}.index.json"
    if not index.is_file():
        return
    try:
        named = set(read_json_inside(folder, index.name, JSON_BYTES)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UnsafeFile) as error:
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


def _attention_shape(config: dict[str, Any]) -> dict[str, Any]:
    """What keys, values and activations take, as far as config.json says it."""
    heads = config.get("num_attention_heads") or config.get("n_head")
    width = config.get("hidden_size") or config.get("n_embd")
    numbers = (int, float)
    head_dim = config.get("head_dim") or (
        width // heads if isinstance(width, numbers) and isinstance(heads, numbers) else None
    )
    return {
        "intermediate_size": config.get("intermediate_size") or config.get("inner_hidden_size"),
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
    }


def _chat_template(folder: Path) -> str:
    """The text of its chat template, or of several; empty: none."""
    with (
        contextlib.suppress(OSError, UnsafeFile),
        open_inside(folder, "chat_template.jinja") as file,
    ):
        return file.read(JSON_BYTES).decode("utf-8", "replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            told = read_json_inside(folder, name, JSON_BYTES).get("chat_template")
        except (OSError, ValueError, AttributeError, UnsafeFile):
            continue
        if told:
            return told if isinstance(told, str) else json.dumps(told)
    return ""


def _thinking(template: str) -> str:
    if "enable_thinking" in template:
        return "switch"
    return "always" if "<think>" in template else ""
