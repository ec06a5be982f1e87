"""ChatGLM-6B as a current transformers model: importing this package makes the Auto classes know
it.

    import chat.chatglm
    # an unchanged official folder; no remote code
    model = AutoModelForCausalLM.from_pretrained(folder)

docs/chatglm.md says what is the same as the original, what is deliberately different, and why.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from .configuration import ChatGLMConfig
from .modeling import ChatGLMForConditionalGeneration, ChatGLMModel
from .prefix_cache import PrefixCache
from .tokenization import ChatGLMTokenizer

AutoConfig.register("chatglm", ChatGLMConfig)
AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer)
# with the head, as the official auto_map has it
AutoModel.register(ChatGLMConfig, ChatGLMForConditionalGeneration)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration)
AutoModelForSeq2SeqLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration)

__all__ = [
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMModel",
    "ChatGLMTokenizer",
    "PrefixCache",
]
