"""From a checkpoint folder to a model ready to run. Code inside checkpoints is never executed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from chat.checkpoints.describe import CheckpointInvalid, describe, fingerprint, read_config
from chat.engine.capacity import free_memory
from chat.engine.families import Family, family_of
from chat.engine.masks import Windows, windows_of
from chat.engine.prompts import Prompter
from chat.ops import weight_only
from chat.ops.cpu_linear import accelerate_linear

# What transformers, torch, safetensors and tokenizers raise on files that are damaged or belong to
# something else.
BROKEN_FILES = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    EOFError,
    UnpicklingError,
    SafetensorError,
)


UNKNOWN = object()


@dataclass
class Loaded:
    """A frozen base model and what belongs to it.

    context_length: tokens of prompt and answer together. windows: what its layers see of them
    (chat.engine.masks). flat: see flat_forward.py; made when an engine first asks for it.
    """

    model: PreTrainedModel
    tokenizer: Any
    prompter: Prompter
    folder: str
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    context_length: int
    layers: int
    kv_heads: int
    head_dim: int
    family: Family
    windows: Windows = None
    flat: Any = field(default=UNKNOWN, repr=False, compare=False)

    @property
    def shifts_positions(self) -> bool:
        """Does a prefix move the prompt's first position by its length?"""
        return self.family.shifts_positions

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding: ids from 0 to this, exclusive, may be fed."""
        return self.model.get_input_embeddings().weight.shape[0]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quantization_bit: int | None = None,
    precision: str | None = None,
) -> Loaded:
    """Load a local checkpoint folder for inference: evaluation mode, no gradients.

    dtype: default float32 on a CPU, the checkpoint's own (float16 if it says none) elsewhere.
    quantization_bit: 4 or 8 packs a ChatGLM-6B's weights on loading. precision: "int8" or "int4"
    packs any family's, each with what it has for that. Raises CheckpointInvalid.
    """
    folder = str(folder)
    describe(folder)
    disable_progress_bar()  # it would fill the log files
    raw = read_config(folder)
    family = _known_family(raw)
    family.register()
    device = torch.device(device) if device is not None else default_device()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if dtype is None:
        own = getattr(
            torch, str(raw.get("dtype") or raw.get("torch_dtype") or "float16"), torch.float16
        )
        dtype = torch.float32 if device.type == "cpu" else own
    if precision and family.can_quantize:
        quantization_bit = int(precision.removeprefix("int"))
    elif precision:
        dtype = weight_only.compute_dtype(precision, device) or dtype
    if quantization_bit:
        if not family.can_quantize:
            raise CheckpointInvalid(
                "config_invalid",
                "quantization_bit applies to ChatGLM-6B checkpoints only",
                reason="quantization_bit",
            )
        config.quantization_bit = quantization_bit
    tokenizer = _tokenizer(folder, family, config)
    # On a GPU each weight goes straight there (and is packed there); several GPUs share the layers
    # unless one is named.
    placement = {}
    if device.type == "cuda":
        spread = device.index is None and torch.cuda.device_count() > 1
        placement["device_map"] = "auto" if spread else {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            **placement,
        )
    except BROKEN_FILES as error:
        raise CheckpointInvalid(
            "weights_invalid", f"the weights cannot be loaded: {error}"
        ) from error
    if not placement:
        model.to(device)
    if precision and not family.can_quantize:
        model.requires_grad_(False)
        weight_only.pack(model, precision)
    return from_parts(
        model,
        tokenizer,
        folder=folder,
        fingerprint_=fingerprint(folder),
        device=device,
        dtype=dtype,
    )


def load_prompter(folder: str | Path) -> Prompter:
    """The text side of a checkpoint alone, without its weights. Raises CheckpointInvalid."""
    folder = str(folder)
    describe(folder)
    family = _known_family(read_config(folder))
    family.register()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    try:
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except BROKEN_FILES:
        generation = None  # as for a model that comes without one
    return family.prompter(_tokenizer(folder, family, config), config, generation)


def _tokenizer(folder: str, family: Family, config: Any) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except BROKEN_FILES as error:
        raise CheckpointInvalid(
            "tokenizer_missing", f"the tokenizer cannot be loaded: {error}"
        ) from error
    fault = family.tokenizer_fault(tokenizer, config)
    if fault:
        raise CheckpointInvalid("tokenizer_missing", fault)
    return tokenizer


def from_parts(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    folder: str = "",
    fingerprint_: str = "",
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """Wrap a model that is already in memory (tests, benchmarks, the starter's build). Freezes
    it.
    """
    model.eval().requires_grad_(False)
    accelerate_linear(model, free_memory(torch.device("cpu")))
    family = _known_family(model.config.to_dict())
    config = model.config.get_text_config()
    parameter = next(model.parameters())
    heads = config.num_attention_heads
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        prompter=family.prompter(
            tokenizer, model.config, getattr(model, "generation_config", None)
        ),
        folder=folder,
        fingerprint=fingerprint_,
        device=device or parameter.device,
        dtype=dtype or parameter.dtype,
        context_length=_context_length(config),
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        family=family,
        windows=windows_of(config),
    )


def _known_family(config: dict[str, Any]) -> Family:
    family = family_of(config)
    if family is None:
        raise CheckpointInvalid(
            "unknown_model_type", f"{config.get('model_type')!r} is no architecture known here"
        )
    return family


def _context_length(config: Any) -> int:
    """Tokens of prompt and answer together. Chunked attention (Llama 4) ends it: a chunk is served,
    not what lies beyond.
    """
    length = (
        getattr(config, "max_sequence_length", None)
        or getattr(config, "max_position_embeddings", None)
        or 2048
    )
    if "chunked_attention" in (getattr(config, "layer_types", None) or []):
        length = min(length, getattr(config, "attention_chunk_size", None) or length)
    return int(length)
