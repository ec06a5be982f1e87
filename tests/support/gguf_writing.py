"""Writes a small model as llama.cpp's converter would: our conversion must find the way back."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.support.tiny_models import CHAT_TEMPLATE, VOCABULARY, byte_tokenizer

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_CONFIGS = {
    "llama": LlamaConfig(**_SHAPE, tie_word_embeddings=False),
    "llama3": LlamaConfig(
        **_SHAPE,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "qwen2": Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(
        **_SHAPE,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "gemma3": Gemma3TextConfig(
        **{**_SHAPE, "num_hidden_layers": 6},
        sliding_window=8,
        query_pre_attn_scalar=16,
        tie_word_embeddings=True,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}
KINDS = tuple(_CONFIGS)
_NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(_CONFIGS[kind]).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms and biases that a mistake would show in
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if kind == "gemma3" else 1.0, std=0.2)
    return model


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    architecture: str | None = None,
    packed: gguf.GGMLQuantizationType | None = None,
    cut: str = "qwen2",
    leave_out: str = "",
) -> Path:
    """`packed`: how matrices are packed, None: float32. `leave_out`: a tensor that is missing."""
    config = model.config
    kind = architecture or config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if kind != "qwen2":
        writer.add_key_length(config.head_dim)
    if kind == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    _write_positions(writer, config)
    _write_tokenizer(writer, cut)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        packed_name, values = _packed_name(name, kind), _as_llama_cpp(name, tensor, kind, config)
        if packed_name == leave_out:
            continue
        if packed is not None and values.ndim == 2:
            writer.add_tensor(packed_name, gguf.quantize(values, packed), raw_dtype=packed)
        else:
            writer.add_tensor(packed_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_positions(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    rule = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rule["rope_theta"])
    if rule["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rule["rope_type"]))
        writer.add_rope_scaling_factor(rule["factor"])
    if rule["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rule["original_max_position_embeddings"])
    if rule["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(config, rule))


def _llama3_factors(config: PretrainedConfig, rule: dict) -> numpy.ndarray:
    """As llama.cpp's convert_hf_to_gguf.py makes them."""
    low = rule["original_max_position_embeddings"] / rule["low_freq_factor"]
    high = rule["original_max_position_embeddings"] / rule["high_freq_factor"]
    factors = []
    for index in range(0, config.head_dim, 2):
        wave = 2 * numpy.pi * rule["rope_theta"] ** (index / config.head_dim)
        if wave < high:
            factors.append(1.0)
        elif wave > low:
            factors.append(rule["factor"])
        else:
            smooth = rule["original_max_position_embeddings"] / wave - rule["low_freq_factor"]
            smooth /= rule["high_freq_factor"] - rule["low_freq_factor"]
            factors.append(1 / ((1 - smooth) / rule["factor"] + smooth))
    return numpy.array(factors, numpy.float32)


def _write_tokenizer(writer: gguf.GGUFWriter, cut: str) -> None:
    backend = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    special = {entry["id"] for entry in backend["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number in special else 1 for number in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)


def _packed_name(name: str, kind: str) -> str:
    if kind == "gemma3":
        name = name.replace("post_attention_layernorm", "post_attention_norm")
    name = name.replace("post_attention_layernorm", "ffn_norm")
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _as_llama_cpp(name: str, tensor: torch.Tensor, kind: str, config) -> numpy.ndarray:
    values = tensor.float().numpy()
    if kind == "gemma3" and name.endswith("norm.weight"):
        values = values + 1
    if kind == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    return numpy.ascontiguousarray(values)
