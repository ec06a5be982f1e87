"""GGUF in: dequantised once into a safetensors folder that everything else here can load.

transformers can read GGUF itself, but keeps the weights packed (nothing could be saved, tuned or
served by the engine then) and passes over what llama.cpp keeps elsewhere: the scaling of rotary
positions, how some vocabularies cut text before they merge. Both are put right here. One tensor and
one shard are in memory at a time. Imports torch: run it in a process of its own.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.gguf_file import GgufHeader, PackedTensor, read_header
from chat.checkpoints.fetch.progress import Watch

SHARD_BYTES = 2 << 30
ROWS_BYTES = 64 << 20  # of a matrix in float32, taken at a time
_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
_CONFIG = {  # llama.cpp's word -> transformers'
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
}
_NAMES = (
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"^output_norm\.", "model.norm."),
    (r"^blk\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.attn_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attn_output\.", ".self_attn.o_proj."),
    (r"\.attn_([qk])_norm\.", r".self_attn.\1_norm."),
    (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."),
    (r"\.post_attention_norm\.", ".post_attention_layernorm."),
    (r"\.post_ffw_norm\.", ".post_feedforward_layernorm."),
)
# Gemma 3 has a norm before and one behind each half of a layer; elsewhere ffn_norm is the second.
_FFN_NORM = {"gemma3": ".pre_feedforward_layernorm."}
_FACTORS = "rope_freqs.weight"
_LLAMA3_POSITIONS = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# How text is cut before merges apply (tokenizer.ggml.pre). transformers knows more of them; what it
# does not know it would cut as GPT-2 does, without a word.
_CUTS_AS_GPT2 = ("default", "gpt-2", "gpt2")
_CUTS_DIGITS_APART = ("smollm",)


def convert(path: Path, folder: Path, watch: Watch, dtype: str = "bfloat16") -> None:
    """Writes config.json, safetensors in `dtype` (bfloat16 or float16) and the tokenizer with its
    chat template.

    FetchFailed: gguf_damaged | gguf_architecture | gguf_tokenizer | gguf_positions.
    """
    header = read_header(path)
    check(header, path)
    import torch
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = _config(header, path)
    with torch.device("meta"):  # shapes and names without memory
        model = AutoModelForCausalLM.from_config(config)
    config.dtype, config.architectures = getattr(torch, dtype), [type(model).__name__]
    _write_weights(header, path, model, folder, config.dtype, watch)
    config.save_pretrained(folder)
    _write_tokenizer(header, path, folder, config)


def check(header: GgufHeader, path: Path) -> None:
    """Refuses by name what would become something that is wrong or cannot be loaded. No torch."""
    if header.architecture not in _MODEL_TYPES:
        known = ", ".join(_MODEL_TYPES)
        raise FetchFailed(
            "gguf_architecture",
            f"GGUF files of the architecture {header.architecture!r} are not converted here "
            f"({known} are)",
            architecture=header.architecture,
            known=known,
        )
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise _damaged(path, "it is one part of several")


def _damaged(path: Path, reason: str) -> FetchFailed:
    return FetchFailed(
        "gguf_damaged",
        f"{path.name} cannot be converted: {reason}",
        file=path.name,
        reason=reason,
    )


# ---------------------------------------------------------------- configuration


def _config(header: GgufHeader, path: Path) -> Any:
    from transformers import AutoConfig

    values = {
        theirs: value
        for ours, theirs in _CONFIG.items()
        if (value := header.of_architecture(ours)) is not None
    }
    missing = {"hidden_size", "num_hidden_layers", "num_attention_heads"} - set(values)
    if missing:
        raise _damaged(path, f"it does not say {', '.join(sorted(missing))}")
    names = {tensor.name: tensor for tensor in header.tensors}
    if "token_embd.weight" not in names:
        raise _damaged(path, "it has no token_embd.weight")
    values["vocab_size"] = names["token_embd.weight"].shape[0]
    values["tie_word_embeddings"] = "output.weight" not in names
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    for token in ("bos", "eos", "padding"):
        key = {"padding": "pad"}.get(token, token)
        values[f"{key}_token_id"] = header.metadata.get(f"tokenizer.ggml.{token}_token_id")
    if header.architecture == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in names
    if header.architecture == "gemma3":  # as llama.cpp: by the head's size, but for the 27B model
        by_head = values["num_hidden_layers"] != 62
        heads = values["hidden_size"] // values["num_attention_heads"]
        values["query_pre_attn_scalar"] = values["head_dim"] if by_head else heads
    config = AutoConfig.for_model(_MODEL_TYPES[header.architecture], **values)
    _set_positions(config, header, path)
    return config


def _set_positions(config: Any, header: GgufHeader, path: Path) -> None:
    """The base of rotary positions and their scaling, which llama.cpp says as metadata or (Llama 3)
    as a tensor of factors.
    """
    layers = config.rope_parameters.get("full_attention", config.rope_parameters)
    layers["rope_theta"] = float(header.of_architecture("rope.freq_base", layers["rope_theta"]))
    scaling = header.of_architecture("rope.scaling.type", "none")
    factor = float(header.of_architecture("rope.scaling.factor", 1.0))
    factors = next((one for one in header.tensors if one.name == _FACTORS), None)
    if factors is not None:
        _set_llama3_positions(config, factors, path)
    elif scaling == "linear":
        layers.update(rope_type="linear", factor=factor)
    elif scaling == "yarn":
        length = header.of_architecture("rope.scaling.original_context_length")
        layers.update(rope_type="yarn", factor=factor, original_max_position_embeddings=length)
    elif scaling not in ("none", ""):
        raise _unknown_positions(str(scaling))


def _unknown_positions(scaling: str) -> FetchFailed:
    return FetchFailed(
        "gguf_positions", f"positions scaled by {scaling!r} are not known here", scaling=scaling
    )


def _set_llama3_positions(config: Any, tensor: PackedTensor, path: Path) -> None:
    """Llama 3's rule, found again from the factors that it gave; refused when another made them."""
    import torch

    if tensor.type != 0 or tensor.shape != (config.head_dim // 2,):
        raise _unknown_positions(_FACTORS)
    with path.open("rb") as file:
        file.seek(tensor.start)
        content = bytearray(file.read(4 * tensor.shape[0]))
    factors = torch.frombuffer(content, dtype=torch.float32)
    rule = config.rope_parameters
    rule.update(_LLAMA3_POSITIONS, factor=float(factors.max()))
    length = rule["original_max_position_embeddings"]
    halves = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    waves = 2 * torch.pi * rule["rope_theta"] ** halves
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    smooth = (length / waves - low) / (high - low)
    between = 1.0 / ((1 - smooth) / rule["factor"] + smooth)
    expected = torch.where(waves < length / high, torch.ones_like(waves), between)
    expected = torch.where(waves > length / low, torch.full_like(waves, rule["factor"]), expected)
    if not torch.allclose(factors, expected, rtol=1e-3):
        raise _unknown_positions(_FACTORS)


# ---------------------------------------------------------------- weights


def _write_weights(
    header: GgufHeader, path: Path, model: Any, folder: Path, dtype: Any, watch: Watch
) -> None:
    """Dequantises tensor by tensor into shards; every parameter of the model must have come."""
    from safetensors.torch import save_file

    shard: dict[str, Any] = {}
    shard_of: dict[str, int] = {}
    held = shards = total = 0

    def put_away() -> None:
        nonlocal held, shards
        shards += 1
        save_file(shard, folder / f"model-{shards:05d}.part", metadata={"format": "pt"})
        shard_of.update(dict.fromkeys(shard, shards))
        shard.clear()
        held = 0

    for name, tensor in _tensors(header, path, model, dtype, watch):
        if held and held + tensor.nbytes > SHARD_BYTES:
            put_away()
        shard[name] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
    put_away()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = sorted(set(model.state_dict()) - set(shard_of) - tied)
    if missing:
        raise _damaged(path, f"{len(missing)} tensors are missing, the first is {missing[0]}")
    _name_shards(folder, shard_of, shards, total)


def _name_shards(folder: Path, shard_of: dict[str, int], shards: int, total: int) -> None:
    """The names that transformers looks for, and an index when there are several."""
    file = {
        one: "model.safetensors" if shards == 1 else f"model-{one:05d}-of-{shards:05d}.safetensors"
        for one in range(1, shards + 1)
    }
    for one, name in file.items():
        (folder / f"model-{one:05d}.part").rename(folder / name)
    if shards > 1:
        places = {name: file[one] for name, one in shard_of.items()}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=2)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _tensors(
    header: GgufHeader, path: Path, model: Any, dtype: Any, watch: Watch
) -> Iterator[tuple[str, Any]]:
    """(name, tensor) as the model has them, in the file's order."""
    shapes = {name: tuple(one.shape) for name, one in model.state_dict().items()}
    sizes = [_packed_bytes(tensor, path) for tensor in header.tensors]
    watch.plan([(path.name, sum(sizes))])
    done = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for packed, size in zip(header.tensors, sizes, strict=True):
            if packed.start + size > len(content):
                raise _damaged(path, "it has been cut off")
            raw = content[packed.start : packed.start + size]
            done += size
            if packed.name == _FACTORS:
                continue
            weights = _dequantised(raw, packed, path, dtype)
            name = _name(packed.name, header.architecture)
            if name not in shapes:
                raise _damaged(path, f"the model has no place for {packed.name}")
            weights = _laid_out(weights, name, header.architecture, model.config).to(dtype)
            if tuple(weights.shape) != shapes[name]:
                reason = f"{name} has the shape {list(weights.shape)}, not {list(shapes[name])}"
                raise _damaged(path, reason)
            yield name, weights.contiguous()
            watch.at(path.name, done, size)


def _packed_bytes(tensor: PackedTensor, path: Path) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type)]
    except (ValueError, KeyError) as error:
        raise _damaged(
            path, f"{tensor.name} is packed in an unknown way ({tensor.type})"
        ) from error
    if tensor.shape[-1] % block:
        raise _damaged(path, f"{tensor.name} does not fill its blocks")
    return math.prod(tensor.shape) // block * width


def _dequantised(raw: bytes, tensor: PackedTensor, path: Path, dtype: Any) -> Any:
    """A vector (a norm, a bias) in float32, a matrix in `dtype`: rows at a time, since a large
    vocabulary in float32 is several times the rest.
    """
    import numpy
    import torch
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(tensor.type)
    plain = {"F32": numpy.float32, "F16": numpy.float16, "F64": numpy.float64}.get(kind.name)
    rows = math.prod(tensor.shape[:-1])
    content = numpy.frombuffer(raw, plain or numpy.uint8).reshape(rows, -1)
    whole = torch.empty(rows, tensor.shape[-1], dtype=torch.float32 if rows == 1 else dtype)
    step = max(1, ROWS_BYTES // (4 * tensor.shape[-1]))
    for first in range(0, rows, step):
        part = content[first : first + step]
        try:
            values = part if plain else dequantize(part, kind)
        except (NotImplementedError, ValueError) as error:
            raise _damaged(path, f"tensors packed as {kind.name} are not known") from error
        whole[first : first + step] = torch.from_numpy(numpy.array(values, numpy.float32))
    return whole.reshape(tensor.shape)


def _name(name: str, architecture: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name.replace(".ffn_norm.", _FFN_NORM.get(architecture, ".post_attention_layernorm."))


def _laid_out(weights: Any, name: str, architecture: str, config: Any) -> Any:
    """Undoes what llama.cpp's converter does to values: rotary halves of Llama's heads are woven
    into each other there, Gemma's norms are stored plus one.
    """
    if architecture == "gemma3" and "norm" in name:
        return weights - 1
    woven = re.search(r"\.(q|k)_proj\.", name)
    if architecture == "llama" and woven:
        heads = config.num_attention_heads if woven[1] == "q" else config.num_key_value_heads
        pairs = weights.reshape(heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:])
        return pairs.swapaxes(1, 2).reshape(weights.shape)
    return weights


# ---------------------------------------------------------------- tokenizer


def _write_tokenizer(header: GgufHeader, path: Path, folder: Path, config: Any) -> None:
    """The tokenizer, its template, and the tokens that end an answer."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    said = {
        name: header.metadata[f"tokenizer.{key}"]
        for key, name in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in header.metadata
    }
    backend_kind, cut = said.get("tokenizer_type"), said.get("pre_tokenizer_type", "default")
    if not said.get("tokens") or not _is_known(backend_kind, cut):
        raise FetchFailed(
            "gguf_tokenizer",
            f"its tokenizer ({backend_kind}, {cut}) is not known here",
            tokenizer=f"{backend_kind}, {cut}",
        )
    try:
        backend, _ = convert_gguf_tokenizer(header.architecture, said)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _damaged(path, f"its tokenizer cannot be built ({error})") from error
    if cut in _CUTS_DIGITS_APART:
        backend.pre_tokenizer = _digits_apart()
    tokens = said["tokens"]
    special = {
        f"{name}_token": tokens[said[f"{name}_token_id"]]
        for name in ("bos", "eos", "unk", "pad")
        if isinstance(said.get(f"{name}_token_id"), int) and said[f"{name}_token_id"] < len(tokens)
    }
    begins = header.metadata.get("tokenizer.ggml.add_bos_token", backend_kind == "llama")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=bool(begins) and "bos_token" in special,
        add_eos_token=False,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **{"bos_token": None, "eos_token": None, **special},
    )
    tokenizer.chat_template = header.metadata.get("tokenizer.chat_template")
    tokenizer.save_pretrained(folder)
    ends = [
        header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")
    ]
    ends = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": ends or None}
    text = json.dumps(generation, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


def _is_known(kind: Any, cut: Any) -> bool:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    byte_level = {*_CUTS_AS_GPT2, *_CUTS_DIGITS_APART, *GGUF_PRE_TOKENIZER_SPLITS}
    return kind == "llama" or (kind == "gpt2" and cut in byte_level)


def _digits_apart() -> Any:
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([digits, rest])
