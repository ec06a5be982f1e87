"""What the files of an adapter's folder are called and what peft wants beside them. No torch.

WEIGHTS holds one tensor, TENSOR: [layers, 2, kv_heads, pre_seq_len, head_dim]. DESCRIPTION says its
shape, its rule for positions and the checkpoint it was trained on (chat.engine.adapters).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WEIGHTS = "adapter.safetensors"
TENSOR = "prefix"
DESCRIPTION = "adapter.json"

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_TENSOR = "prompt_embeddings"  # [pre_seq_len, layers * 2 * kv_heads * head_dim]


def peft_config(shape: Sequence[int], base_model: str, frozen: int | None = None) -> dict[str, Any]:
    """peft's PREFIX_TUNING configuration of a prefix of this shape; with `frozen`, how many of its
    first positions never learn, that of a CARTRIDGE, which has the same weights (peft from 0.19).
    base_model: the name that peft is to remember.
    """
    layers, _two, kv_heads, pre_seq_len, head_dim = shape
    shared = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": pre_seq_len,
        "num_layers": layers,
        "num_attention_heads": kv_heads,
        "token_dim": kv_heads * head_dim,
        "num_transformer_submodules": 1,
    }
    if frozen is not None:
        return {"peft_type": "CARTRIDGE", **shared, "num_frozen_tokens": frozen}
    return {
        "peft_type": "PREFIX_TUNING",
        **shared,
        "prefix_projection": False,
        "encoder_hidden_size": kv_heads * head_dim,
    }


def frozen_tokens(metadata: Mapping[str, Any]) -> int:
    """How many first positions of a prefix were kept as they began, by its adapter's metadata."""
    told = metadata.get("num_frozen_tokens")
    if isinstance(told, int):
        return told
    recipe = metadata.get("recipe")
    return int(isinstance(recipe, dict) and bool(recipe.get("freeze_first")))


def join(front: Path, behind: Path, target: Path, metadata: dict[str, Any]) -> None:
    """Writes into `target` an adapter whose prefix is that of `front` and then that of `behind`.
    ValueError when they are of different shapes, precisions or rules; OSError, KeyError.
    """
    told = [
        json.loads((each / DESCRIPTION).read_text(encoding="utf-8")) for each in (front, behind)
    ]
    same = ("layers", "kv_heads", "head_dim", "dtype", "shifts_positions")
    differing = [name for name in same if told[0][name] != told[1][name]]
    if differing:
        sides = [f"{name} {told[0][name]} and {told[1][name]}" for name in differing]
        raise ValueError(", ".join(sides))
    (first, kind), (second, _kind) = (_tensor(each / WEIGHTS) for each in (front, behind))
    # [layers, 2, kv_heads, pre_seq_len, head_dim]: block after block of one head's positions
    blocks = 2 * told[0]["layers"] * told[0]["kv_heads"]
    sizes = len(first) // blocks, len(second) // blocks
    data = b"".join(
        part[block * size : (block + 1) * size]
        for block in range(blocks)
        for part, size in zip((first, second), sizes, strict=True)
    )
    length = told[0]["pre_seq_len"] + told[1]["pre_seq_len"]
    shape = [told[0]["layers"], 2, told[0]["kv_heads"], length, told[0]["head_dim"]]
    entry = {"dtype": kind, "shape": shape, "data_offsets": [0, len(data)]}
    head = json.dumps({TENSOR: entry}).encode()
    head += b" " * (-len(head) % 8)
    content = len(head).to_bytes(8, "little") + head + data
    target.mkdir(parents=True)
    (target / WEIGHTS).write_bytes(content)
    description = {
        **told[1],
        "pre_seq_len": length,
        "sha256": hashlib.sha256(content).hexdigest(),
        # the one in front is where attention rests
        "metadata": {**metadata, "num_frozen_tokens": frozen_tokens(told[0].get("metadata") or {})},
    }
    text = json.dumps(description, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    (target / DESCRIPTION).write_text(text, encoding="utf-8")


def _tensor(path: Path) -> tuple[memoryview, str]:
    """(bytes of the prefix, its type) in a safetensors file: eight bytes of length, a JSON head,
    the tensors.
    """
    content = memoryview(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    entry = json.loads(bytes(content[8:start]))[TENSOR]
    low, high = entry["data_offsets"]
    return content[start + low : start + high], entry["dtype"]
