"""A tuned model as a checkpoint folder: its base's files with other weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from chat.checkpoints.describe import TOKENIZER_FILES, read_config
from chat.checkpoints.provenance import SOURCE_FILE
from chat.engine.loading import Loaded

# of the base's folder, whichever it has: they belong to the tuned model as they are
KEPT = (*TOKENIZER_FILES, "generation_config.json", "README.md", "LICENSE", "NOTICE")


def stored_dtype(folder: str) -> torch.dtype:
    """The precision in which a checkpoint keeps its weights."""
    config = read_config(folder) if folder else {}
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = getattr(torch, named, torch.float32)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def write(
    model: Any,
    base: Loaded,
    folder: Path,
    told: dict[str, Any],
    changed: dict[str, torch.Tensor] | None = None,
) -> None:
    """Weights and configuration by transformers, the rest copied from the base, and source.json
    with `told`. changed: whole weights by name where `model` holds parts of them.

    The model's own weights become what is stored: the precision is the base's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = stored_dtype(base.folder)
    if changed is None:
        model.to(dtype)
        state = model.state_dict()
    else:
        state = dict(model.state_dict(keep_vars=True)) | changed
        shared = {id(parameter) for parameter in model.parameters()}
        for name in set(state) - set(changed):
            if id(state[name]) in shared:  # a weight that stands there under another name
                del state[name]
        state = {name: tensor.detach().to("cpu", dtype) for name, tensor in state.items()}
    model.config.dtype = dtype
    model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    for name in KEPT:
        source = Path(base.folder) / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    (folder / SOURCE_FILE).write_text(
        json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
