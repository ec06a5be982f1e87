"""Shapes and prompts of the ChatGLM benchmark."""

from __future__ import annotations

import torch

from chat.chatglm import ChatGLMConfig

SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "num_layers": 4,
        "num_attention_heads": 4,
        "inner_hidden_size": 256,
        "vocab_size": 1408,
    },
    "mid-small": {
        "hidden_size": 512,
        "num_layers": 8,
        "num_attention_heads": 8,
        "inner_hidden_size": 2048,
        "vocab_size": 1408,
    },
    "mid": {
        "hidden_size": 512,
        "num_layers": 8,
        "num_attention_heads": 8,
        "inner_hidden_size": 2048,
        "vocab_size": 130528,
    },
    "6b": {},  # the defaults
}
SMALL_IDS = {
    "bos_token_id": 1004,
    "eos_token_id": 1005,
    "mask_token_id": 1000,
    "gmask_token_id": 1001,
    "pad_token_id": 3,
}
PROMPT, NEW, LONG_PROMPT, SOURCE, TARGET, PREFIX = 34, 64, 256, 64, 64, 128
PREFILLS = 8  # a round; one takes 5 ms at the tiny shape


def configuration(shape: str) -> ChatGLMConfig:
    # The small vocabulary's special ids also in the big embedding: its rows beyond 1,407 are never
    # written, as for most tokens.
    return ChatGLMConfig(**SHAPES[shape], **({} if shape == "6b" else SMALL_IDS))


def prompt_ids(length: int, config: ChatGLMConfig, seed: int = 0) -> list[int]:
    draw = torch.randint(5, 900, (length - 2,), generator=torch.Generator().manual_seed(seed))
    return [*draw.tolist(), config.gmask_token_id, config.bos_token_id]
