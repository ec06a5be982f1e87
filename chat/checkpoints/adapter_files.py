"""What the files of an adapter's folder are called and what peft wants beside them. No torch.

WEIGHTS holds one tensor, TENSOR: [layers, 2, kv_heads, pre_seq_len, head_dim]. DESCRIPTION says its
shape, its rule for positions and the checkpoint it was trained on (chat.engine.adapters).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WEIGHTS = "adapter.safetensors"
TENSOR = "prefix"
DESCRIPTION = "adapter.json"

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_TENSOR = "prompt_embeddings"  # [pre_seq_len, layers * 2 * kv_heads * head_dim]


def peft_config(shape: Sequence[int], base_model: str) -> dict[str, Any]:
    """peft's PREFIX_TUNING configuration of a prefix of this shape. base_model: the name that peft
    is to remember.
    """
    layers, _two, kv_heads, pre_seq_len, head_dim = shape
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": pre_seq_len,
        "num_layers": layers,
        "num_attention_heads": kv_heads,
        "token_dim": kv_heads * head_dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": kv_heads * head_dim,
    }
