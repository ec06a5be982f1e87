"""Tiny random models of each architecture, their prefixes, and the plain generation that the engine
must equal.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from peft import PrefixTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from chat.engine.adapters import KVPrefix, save
from chat.engine.loading import Loaded, from_parts
from chat.engine.request import AdapterRef, Request, SamplingParams

VOCABULARY = 320
CONTEXT = 256
LONG_CONTEXT = 4096  # of an architecture with `-long` behind its name
# whose layers see the last WINDOW tokens: all of Mistral's, some of the others'
WINDOWED = ("gemma3", "gemma2", "mistral", "qwen2-window")
WINDOW = 16
ARCHITECTURES = ("qwen2", "qwen3", "llama", "glm", "chatglm", *WINDOWED)
END = 0
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + "
    "'<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIALS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
# ChatGLM's control tokens, at the end of the small vocabulary
MASK, GMASK, SOP, EOP, PAD = 315, 316, 317, 318, 319


@lru_cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: every Chinese character is several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        ["hello world, this is a small vocabulary. " * 3, "裙子的颜色是白色，风格是简约。" * 3],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(architecture: str) -> PretrainedConfig:
    architecture, long, _ = architecture.partition("-long")
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT if not long else LONG_CONTEXT,
        "initializer_range": 0.25,  # large, so that the best token is best by far
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": None,
    }
    if architecture == "qwen2":
        return Qwen2Config(**shape, num_key_value_heads=2)
    if architecture == "qwen3":
        return Qwen3Config(**shape, num_key_value_heads=2, head_dim=8)
    if architecture == "llama":
        return LlamaConfig(**shape, num_key_value_heads=4)
    if architecture == "glm":
        return GlmConfig(
            **shape,
            num_key_value_heads=2,
            head_dim=8,
            partial_rotary_factor=0.5,
            attention_bias=True,
        )
    if architecture == "mistral":
        return MistralConfig(**shape, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW)
    if architecture == "qwen2-window":
        window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
        return Qwen2Config(**shape, num_key_value_heads=2, **window)
    if architecture in ("gemma2", "gemma3"):
        local, whole = "sliding_attention", "full_attention"
        shape |= {"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8}
        shape |= {"sliding_window": WINDOW, "layer_types": [local, whole, local]}
        shape |= {"tie_word_embeddings": False}  # tied, so scaled, it would repeat its last token
        if architecture == "gemma2":
            return Gemma2Config(**shape)
        rotary = {  # near tokens turn faster in the layers that see only those
            local: {"rope_type": "default", "rope_theta": 1e4},
            whole: {"rope_type": "default", "rope_theta": 1e6},
        }
        return Gemma3TextConfig(**shape, rope_parameters=rotary)
    from chat.chatglm import ChatGLMConfig

    return ChatGLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=3,
        num_attention_heads=4,
        inner_hidden_size=64,
        max_sequence_length=CONTEXT,
        bos_token_id=SOP,
        eos_token_id=EOP,
        mask_token_id=MASK,
        gmask_token_id=GMASK,
        pad_token_id=PAD,
        initializer_range=0.25,
    )


@lru_cache
def plain_model(architecture: str) -> PreTrainedModel:
    """As transformers has it, for reference."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture)).eval().requires_grad_(False)
    if architecture == "chatglm":
        # Its residual weighs 7.5 times: with small layers a model that shares its embedding repeats
        # its last token.
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.25 if "embed" in name else 1.0)
    return model


@lru_cache
def loaded_model(architecture: str) -> Loaded:
    """The same weights as the engine loads them."""
    return from_parts(
        copy.deepcopy(plain_model(architecture)),
        byte_tokenizer(),
        fingerprint_=f"fingerprint-{architecture}",
    )


def prefix_tensor(architecture: str, length: int, seed: int) -> torch.Tensor:
    """[layers, 2, kv_heads, length, head_dim]"""
    loaded = loaded_model(architecture)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        loaded.layers, 2, loaded.kv_heads, length, loaded.head_dim, generator=generator
    )


def adapter(architecture: str, folder: Path, length: int, seed: int) -> AdapterRef:
    """Saved to disk, as a run publishes it."""
    loaded = loaded_model(architecture)
    prefix = KVPrefix(
        prefix_tensor(architecture, length, seed), loaded.shifts_positions, loaded.fingerprint
    )
    name = save(prefix, folder / f"{architecture}-{length}-{seed}")
    return AdapterRef(name, str(folder / f"{architecture}-{length}-{seed}"))


@lru_cache
def _peft_model(architecture: str, length: int, seed: int):
    model = copy.deepcopy(plain_model(architecture))
    peft_model = get_peft_model(
        model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    ).eval()
    tensor = prefix_tensor(architecture, length, seed)
    weight = peft_model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():  # peft's order: [pre_seq_len, layers * 2 * kv_heads * head_dim]
        weight.copy_(tensor.permute(3, 0, 1, 2, 4).reshape(weight.shape))
    return peft_model


@dataclass(frozen=True)
class Prefix:
    length: int
    seed: int


def reference(
    architecture: str, prompt: tuple[int, ...], new_tokens: int, prefix: Prefix | None
) -> tuple[int, ...]:
    """Greedy tokens by plain generation: peft's PrefixTuning where there is a prefix, ChatGLM's own
    prefix cache there.
    """
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": END}
    if prefix is None:
        output = plain_model(architecture).generate(ids, **settings)
    elif architecture == "chatglm":
        from chat.chatglm import PrefixCache

        cache = PrefixCache(prefix_tensor(architecture, prefix.length, prefix.seed))
        output = plain_model(architecture).generate(ids, past_key_values=cache, **settings)
    else:
        peft_model = _peft_model(architecture, prefix.length, prefix.seed)
        output = peft_model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return tuple(output[0, len(prompt) :].tolist())


def random_prompt(
    architecture: str, draw: random.Random, shortest: int = 1, longest: int = 60
) -> tuple[int, ...]:
    length = draw.randint(shortest, longest)
    if architecture == "chatglm":
        return (*(draw.randrange(5, 300) for _ in range(length)), GMASK, SOP)
    return tuple(draw.randrange(len(SPECIALS), VOCABULARY) for _ in range(length))


def greedy(
    identity: str, prompt: tuple[int, ...], new_tokens: int, ref: AdapterRef | None = None, **kwargs
) -> Request:
    sampling = SamplingParams(do_sample=False, max_new_tokens=new_tokens)
    return Request(id=identity, prompt_ids=prompt, adapter=ref, sampling=sampling, **kwargs)
