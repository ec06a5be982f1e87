"""Tiny ChatGLM checkpoint folders in the official layout, for any test that needs one (random
weights, our vocabulary).
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests import support

DATA = support.DATA / "chatglm"


def tiny_folder(folder: Path, weights: str = "fp32") -> Path:
    """Write an official-layout folder into `folder` (made if missing) and return it.

    weights: "fp32" one pytorch_model.bin, "fp16" the same in three shards with an index, or "int4"
    packed (1.2, 0.6, 0.5 MB). Shape: vocabulary 1,408, hidden 64, 4 layers, 4 heads, 128 positions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = DATA / ("tiny_int4" if weights == "int4" else "tiny")
    shutil.copyfile(source / "config.json", folder / "config.json")
    shutil.copyfile(DATA / "tiny" / "tokenizer_config.json", folder / "tokenizer_config.json")
    shutil.copyfile(DATA / "vocabulary.model", folder / "ice_text.model")
    if weights == "fp16":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
        state = torch.load(source / "pytorch_model.bin", weights_only=True)
        write_shards(folder, {name: tensor.half() for name, tensor in state.items()}, shards=3)
    else:
        shutil.copyfile(source / "pytorch_model.bin", folder / "pytorch_model.bin")
    return folder


def write_shards(folder: Path, state: dict[str, torch.Tensor], shards: int) -> None:
    """pytorch_model-0000i-of-0000n.bin and their index, tensors dealt out in order."""
    names = list(state)
    share = -(-len(names) // shards)
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = {name: state[name] for name in names[shard * share : (shard + 1) * share]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    # Official indexes hold a stale total; it is not validated, so any number will do.
    index = {"metadata": {"total_size": 13744473856}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def golden_folder():
    """Reference files that may not be in this repository; the folder is named by CHATGLM_GOLDEN."""
    folder = os.environ.get("CHATGLM_GOLDEN")
    if not folder:
        pytest.skip("CHATGLM_GOLDEN names no folder with the reference files")
    return folder


def vocabulary_folder():
    """The published vocabulary and its tokenizer_config.json; the folder is named by
    CHATGLM_VOCABULARY.
    """
    folder = os.environ.get("CHATGLM_VOCABULARY")
    if not folder:
        pytest.skip("CHATGLM_VOCABULARY names no folder with the published vocabulary")
    return folder
