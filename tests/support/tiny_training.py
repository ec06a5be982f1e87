"""A tiny random checkpoint with a byte-level tokenizer, for tests of training: no weights are
downloaded.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from chat.engine.loading import Loaded, from_parts

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>"
    )
    made.add_special_tokens(
        {"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"]}
    )
    made.chat_template = TEMPLATE
    return made


def model(kind: str = "qwen2", seed: int = 0, **changes):
    """Grouped-query attention for Qwen2, one key head per query head for Llama, for Gemma 3 layers
    that see the last 12 tokens around one that sees all. Vocabulary: 261 of 272 rows are used.
    """
    shape = {
        "vocab_size": 272,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kind == "llama" else 2,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "eos_token_id": 256,
        "pad_token_id": 257,
        "initializer_range": 0.2,  # large enough that attention, and so the prefix, matters
        **changes,
    }
    torch.manual_seed(seed)
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shape))
    if kind == "gemma3":
        local = "sliding_attention"
        shape |= {"layer_types": [local, "full_attention", local], "sliding_window": 12}
        shape |= {"head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": False}
        return Gemma3ForCausalLM(Gemma3TextConfig(**shape))
    return LlamaForCausalLM(LlamaConfig(**shape))


def loaded(kind: str = "qwen2", seed: int = 0, **changes) -> Loaded:
    return from_parts(model(kind, seed, **changes), tokenizer())


def write(folder: Path, **changes) -> Path:
    """A checkpoint folder as people register it."""
    model(**changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def examples(count: int = 24) -> list[dict]:
    """Rows of different lengths, as tuning/datasets/store.py gives them."""
    return [
        {
            "prompt": f"问{number} " + "ab" * (number % 5),
            "response": "答" * (1 + number % 4) + str(number),
            "history": [],
        }
        for number in range(count)
    ]
