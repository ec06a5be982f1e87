"""ChatGLM-6B's configuration (docs/chatglm.md#1-configuration), as its config.json spells it."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# The layout before April 2023: 20,000 rows for image tokens, never used, stand first.
_OLDEST_VOCABULARY, _IMAGE_TOKENS = 150528, 20000


@strict
class ChatGLMConfig(PreTrainedConfig):
    """Shape and special ids of a ChatGLM-6B checkpoint.

    The defaults are those of the published v1.1.0 checkpoint, vocabulary 130,528; the original's
    class defaults describe the earlier 150,528 layout, whose first config.json does not name every
    special id. Those that are left out (None here) follow from the others: [MASK], [gMASK],
    [sMASK], an unused one, <sop> and <eop> stand in this order in every layout.

    quantization_bit: 0 or None for plain weights, 8 or 4 when the layers' linear weights are packed
    (`quantization.py`). pre_seq_len, prefix_projection: written by P-tuning runs of the original
    scripts; they describe a prefix that lies
        beside the model, so this model ignores them (chat.checkpoints.foreign_adapters reads).
    """

    model_type = "chatglm"
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    position_encoding_2d: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    pad_token_id: int | None = None
    quantization_bit: int | None = 0
    quantization_embeddings: bool = False
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # Remote code is never run: the pointers to it are of no use, and would be written out again
        # by save_pretrained.
        if getattr(self, "auto_map", None):
            del self.auto_map
        if hasattr(self, "padded_vocab_size"):
            raise ValueError(
                "a ChatGLM2, ChatGLM3 or GLM-4 checkpoint has another architecture: ChatGLM-6B is "
                "supported"
            )
        self._fill_in_special_ids()
        if not self.position_encoding_2d:
            raise ValueError(
                "ChatGLM with position_encoding_2d=false is not supported: no such checkpoint was "
                "published"
            )
        if self.hidden_size % self.num_attention_heads or self.head_dim % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} over {self.num_attention_heads} heads leaves no "
                "head size divisible by 4"
            )
        if self.quantization_embeddings:
            raise ValueError(
                "a checkpoint with packed embeddings (int4-qe, discontinued upstream) is not "
                "supported"
            )
        if (self.quantization_bit or 0) not in (0, 4, 8):
            raise ValueError(f"quantization_bit is {self.quantization_bit}; it can be 0, 4 or 8")

    def _fill_in_special_ids(self) -> None:
        offset = _IMAGE_TOKENS if self.vocab_size == _OLDEST_VOCABULARY else 0
        first = 130000 + offset if self.bos_token_id is None else self.bos_token_id - 4
        places = {
            "mask_token_id": first,
            "gmask_token_id": first + 1,
            "bos_token_id": first + 4,
            "eos_token_id": first + 5,
        }
        for name, token_id in {**places, "pad_token_id": 3 + offset}.items():
            if getattr(self, name) is None:
                setattr(self, name, token_id)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads
