"""A tiny random checkpoint of each family that people bring, with the chat template that the family
publishes (chat_templates/, shortened by the tools, but for those WITH_TOOLS).
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.support.tiny_models import byte_tokenizer, tiny_config

TEMPLATES = Path(__file__).parent / "chat_templates"
ROOM = 352  # ids, with the templates' own control tokens
CONTROL = re.compile(
    r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>|</?think>|<sop>|\[/?INST\]|\[gMASK\]"
    r"|\[TOOL_CALLS\]|\[/?AVAILABLE_TOOLS\]|\[/?TOOL_RESULTS\]"
)


@dataclass(frozen=True)
class Published:
    """architecture: of tests.support.tiny_models. end: the token behind an answer."""

    architecture: str
    template: str
    end: str
    begin: str = "<s>"


FAMILIES = {
    "Qwen2": Published("qwen2", "qwen2", "<|im_end|>"),
    "Qwen2.5": Published("qwen2", "qwen2.5", "<|im_end|>"),
    "Qwen2 with a window": Published("qwen2-window", "qwen2", "<|im_end|>"),
    "Qwen3": Published("qwen3", "qwen3", "<|im_end|>"),
    "Llama 3": Published("llama", "llama3", "<|eot_id|>", "<|begin_of_text|>"),
    "SmolLM2": Published("llama", "smollm2", "<|im_end|>"),
    "GLM-4": Published("glm", "glm4", "<|user|>"),
    "Mistral": Published("mistral", "mistral", "</s>"),
    "Gemma 2": Published("gemma2", "gemma2", "<end_of_turn>", "<bos>"),
    "Gemma 3": Published("gemma3", "gemma3", "<end_of_turn>", "<bos>"),
    "InternLM as Llama": Published("llama", "internlm", "<|im_end|>"),
}

WITH_TOOLS = {
    "Qwen2.5 with tools": Published("qwen2", "qwen2.5-tools", "<|im_end|>"),
    "Llama 3.1 with tools": Published("llama", "llama3.1-tools", "<|eot_id|>", "<|begin_of_text|>"),
    "Mistral with tools": Published("mistral", "mistral-tools", "</s>"),
}
ALL = FAMILIES | WITH_TOOLS


def template_of(name: str) -> str:
    return (TEMPLATES / f"{ALL[name].template}.jinja").read_text(encoding="utf-8")


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Byte-level, with the control tokens that the template writes, each one token."""
    published, template = ALL[name], template_of(name)
    made = PreTrainedTokenizerFast(
        tokenizer_object=type(byte_tokenizer().backend_tokenizer).from_str(
            byte_tokenizer().backend_tokenizer.to_str()
        ),
        bos_token=published.begin,
        eos_token=published.end,
        pad_token="<pad>",
    )
    control = sorted(set(CONTROL.findall(template)) - {published.begin, published.end})
    made.add_special_tokens({"additional_special_tokens": control})
    assert len(made) <= ROOM
    made.chat_template = template
    return made


def write(name: str, folder: Path, context: int | None = None) -> Path:
    """The folder as people register it."""
    config, text = tiny_config(ALL[name].architecture), tokenizer(name)
    config.vocab_size = ROOM
    config.max_position_embeddings = context or config.max_position_embeddings
    config.bos_token_id, config.eos_token_id = text.bos_token_id, text.eos_token_id
    config.pad_token_id = text.pad_token_id
    torch.manual_seed(11)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder
