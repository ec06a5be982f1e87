"""Checkpoint and adapter folders for tests: real enough to be registered, too small to be worth
running.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYERS, KV_HEADS, PRE_SEQ_LEN, HEAD_DIM = 2, 2, 3, 4


def checkpoint_folder(folder: Path, seed: int = 0) -> Path:
    """A Qwen2-shaped folder; another seed is another fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "num_hidden_layers": LAYERS,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": 64,
        "max_position_embeddings": 128,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    weights = np.random.default_rng(seed).standard_normal((64, 16)).astype("float32")
    save_file({"model.embed_tokens.weight": weights}, folder / "model.safetensors")
    return folder


def adapter_folder(folder: Path, checkpoint_fingerprint: str = "", seed: int = 0) -> Path:
    """What chat.engine.adapters.save writes."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (LAYERS, 2, KV_HEADS, PRE_SEQ_LEN, HEAD_DIM)
    prefix = np.random.default_rng(seed).standard_normal(shape).astype("float32")
    save_file({"prefix": prefix}, folder / "adapter.safetensors")
    description = {
        "format": 1,
        "layers": LAYERS,
        "kv_heads": KV_HEADS,
        "pre_seq_len": PRE_SEQ_LEN,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        "shifts_positions": True,
        "checkpoint_fingerprint": checkpoint_fingerprint,
        "metadata": {},
    }
    (folder / "adapter.json").write_text(json.dumps(description))
    return folder
