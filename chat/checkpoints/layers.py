"""Which models cannot hold a prefix, told from config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# KV caches that are not plain keys and values per token cannot take a prefix.
PLAIN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Models whose layers keep a state in place of keys and values, by what their config.json says: of
# their own, however the layers are listed ...
STATE_MODELS = {
    *("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma"),
    *("jamba", "bamba", "zamba", "zamba2", "falcon_h1", "nemotron_h", "granitemoehybrid"),
    *("lfm2", "lfm2_moe", "minimax", "kimi_linear", "bailing_hybrid", "olmo_hybrid"),
    *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
}
# ... or by a number that only such layers have, or layers that differ from each other in shape
STATE_NAMES = {
    "full_attention_interval": "linear_attention",
    "linear_num_value_heads": "linear_attention",
    "mamba_d_state": "mamba",
    "ssm_state_size": "mamba",
    "kv_lora_rank": "latent_attention",
    "num_kv_shared_layers": "shared_keys",
    "global_head_dim": "heads_of_two_sizes",
}


def unusual_layers(config: Mapping[str, Any]) -> list[str]:
    """Kinds of layers before which no prefix of plain keys and values fits; none: it can be served
    and tuned.
    """
    inner = config.get("text_config")
    told = {**config, **inner} if isinstance(inner, dict) else dict(config)
    kinds: set[str] = set()
    for name in ("layer_types", "layers_block_type", "block_types"):
        listed = told.get(name)
        listed = listed if isinstance(listed, list) else []
        kinds |= {str(kind) for kind in listed} - PLAIN_LAYERS - {"attention"}
    kinds |= {kind for name, kind in STATE_NAMES.items() if told.get(name)}
    if not kinds and STATE_MODELS & {config.get("model_type"), told.get("model_type")}:
        kinds.add("state_space")
    return sorted(kinds)
