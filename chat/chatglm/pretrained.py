"""From a checkpoint's folder to a model: what ChatGLM's classes share."""

from __future__ import annotations

import re
from copy import deepcopy

from transformers import PreTrainedConfig, PreTrainedModel

from .configuration import ChatGLMConfig
from .quantization import PackOnLoad
from .streaming import streamed

_OF_A_LAYER = re.compile(r"layers\.\d+\.")


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    # inv_freq is recomputed; lm_head.weight repeats the embedding (and the original drops it when
    # it differs); the prefix encoder of an old P-tuning checkpoint that holds the whole model is
    # read by foreign_adapters.
    _keys_to_ignore_on_load_unexpected = [
        r"rotary_emb\.inv_freq$",
        r"^lm_head\.weight$",
        r"prefix_encoder\.",
    ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """transformers' loader; and when `quantization_bit` (of `config`, or given) asks for packed
        weights that the checkpoint has plain, they are packed tensor by tensor on their way in.
        Raises OSError when a file cannot be read, ValueError when the weights are not those that
        config.json describes.
        """
        stored = (
            PreTrainedConfig.get_config_dict(pretrained_model_name_or_path)[0].get(
                "quantization_bit"
            )
            or 0
        )
        wanted = kwargs.pop("quantization_bit", None)
        if wanted is None:
            wanted = getattr(config, "quantization_bit", None)
        wanted = stored if wanted is None else wanted
        if stored and wanted != stored:
            raise ValueError(
                f"the checkpoint is packed at {stored} bits and cannot be loaded with "
                f"quantization_bit={wanted}"
            )
        if wanted != stored:
            config = (
                ChatGLMConfig.from_pretrained(pretrained_model_name_or_path)
                if config is None
                else deepcopy(config)
            )
            config.quantization_bit = wanted
            kwargs["quantization_config"] = PackOnLoad(wanted)
        wants_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            config=config,
            output_loading_info=True,
            **kwargs,
        )
        _demand_the_described_weights(pretrained_model_name_or_path, report)
        return (model, report) if wants_report else model

    @staticmethod
    def _load_pretrained_model(
        model, state_dict, checkpoint_files, load_config, expected_keys=None
    ):
        """transformers' own, with files that are read tensor by tensor (it would map them and keep
        them).
        """
        if state_dict is None and checkpoint_files:
            packs = load_config.hf_quantizer is not None
            state_dict = streamed(checkpoint_files, load_config.dtype, copies=packs)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )


def _demand_the_described_weights(folder: str, report: dict) -> None:
    """transformers draws missing weights at random and drops layers that config.json has no place
    for, with a warning each: an answer from such a model is worth nothing.
    """
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ValueError(
            f"{folder} lacks {len(names)} of the model's weights, among them {names[0]}: "
            "is a shard missing, or is it a P-tuning checkpoint, which holds a prefix only?"
        )
    undescribed = sorted(name for name in report["unexpected_keys"] if _OF_A_LAYER.search(name))
    if undescribed:
        raise ValueError(
            f"{folder} holds {len(undescribed)} weights that its config.json does not describe, "
            f"among them {undescribed[0]}: "
            "are num_layers and quantization_bit those of these weights?"
        )
