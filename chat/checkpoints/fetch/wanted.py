"""Which files of a model's folder are needed, told from their names and sizes: at a hub, on a disk
and in an archive alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from chat.checkpoints.describe import TOKENIZER_FILES, VOCABULARY_FILES
from chat.checkpoints.fetch.failures import FetchFailed

# Weights in the order of preference: safetensors cannot run code; of several spellings only one is
# needed.
_WEIGHTS = (
    re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors"),
    re.compile(r"(?!.*adapter)(?!consolidated)[\w.-]+\.safetensors"),
    re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin"),
)
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_TEXTS = re.compile(
    r"(licen[cs]e|notice|usage_?policy|model_?license|.*terms)[\w.-]*", re.IGNORECASE
)
TEXT_BYTES, CONFIG_BYTES = 2 << 20, 128 << 20  # a vocabulary may be large, a licence is not


def needed_files(sizes: Mapping[str, int]) -> list[str]:
    """Of {name: bytes}, the names that make the checkpoint: config, tokenizer, one format of
    weights, licence. Or one GGUF file.

    No Python file is ever among them. FetchFailed: no_weights | no_config | no_tokenizer |
    file_too_large | several_gguf.
    """
    weights = next(
        (found for pattern in _WEIGHTS if (found := sorted(filter(pattern.fullmatch, sizes)))), []
    )
    if not weights:
        return [_the_gguf(sizes), *_texts(sizes)]
    whole = [name for name in weights if "-of-" not in name]
    if len(whole) == 1:  # the same weights both whole and in parts
        weights = whole
    _all_parts(weights)
    for name, code in (("config.json", "no_config"), (VOCABULARY_FILES, "no_tokenizer")):
        if not any(one in sizes for one in ([name] if isinstance(name, str) else name)):
            raise FetchFailed(
                code,
                f"there is no {name if isinstance(name, str) else 'tokenizer'} beside the weights",
            )
    index = [
        name
        for name in _INDEXES
        if name in sizes and name.removesuffix(".index.json").split(".")[-1] in weights[0]
    ]
    configs = [
        name
        for name in ("config.json", "generation_config.json", *TOKENIZER_FILES)
        if name in sizes
    ]
    for name in (*configs, *index):
        if sizes[name] > CONFIG_BYTES:
            raise FetchFailed(
                "file_too_large",
                f"{name} has {sizes[name]} bytes, which is no configuration",
                file=name,
            )
    return [*configs, *index, *weights, *_texts(sizes)]


def _all_parts(weights: list[str]) -> None:
    """Parts are numbered: one that is missing is told before anything is fetched."""
    parts = [found for name in weights if (found := re.search(r"-(\d{5})-of-(\d{5})\.", name))]
    if parts:
        missing = set(range(1, int(parts[0][2]) + 1)) - {int(found[1]) for found in parts}
        if missing:
            first = weights[0].replace(parts[0][0], f"-{min(missing):05d}-of-{parts[0][2]}.")
            raise FetchFailed(
                "parts_missing",
                f"{len(missing)} weight files are missing, the first is {first}",
                file=first,
            )


def _the_gguf(sizes: Mapping[str, int]) -> str:
    found = sorted(name for name in sizes if name.lower().endswith(".gguf") and "/" not in name)
    if not found:
        raise FetchFailed(
            "no_weights",
            "there are no weights: neither safetensors, nor pytorch_model.bin, nor GGUF",
        )
    if len(found) > 1:
        raise FetchFailed(
            "several_gguf",
            f"name one of its GGUF files: {', '.join(found)}",
            files=", ".join(found),
            first=found[0],
        )
    return found[0]


def _texts(sizes: Mapping[str, int]) -> list[str]:
    return sorted(
        name
        for name, size in sizes.items()
        if _TEXTS.fullmatch(name) and size <= TEXT_BYTES and not name.endswith(".py")
    )
