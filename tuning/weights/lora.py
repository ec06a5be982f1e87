"""LoRA by peft: which modules it changes, and how the changes become weights again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from chat.ops.cpu_linear import forget_packed
from tuning.ptuning.progress import TrainingFailed
from tuning.ptuning.recipe import Recipe


def targets(model: nn.Module, wish: str = "") -> list[str]:
    """Names of the modules that LoRA changes, sorted: those of `wish` (comma-separated), else every
    kind of linear layer between embedding and output layer, whatever the family calls them (for
    Llama's q_proj ... down_proj, for ChatGLM query_key_value, dense ...). TrainingFailed when the
    model has none of a wish.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    kinds = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if not wish.strip():
        return sorted(kinds)
    wanted = {name.strip() for name in wish.split(",") if name.strip()}
    unknown = sorted(wanted - kinds)
    if unknown:
        message = f"the base has no linear layers {', '.join(unknown)}, but {', '.join(kinds)}"
        raise TrainingFailed("lora_targets_unknown", message)
    return sorted(wanted)


def wrapped(model: Any, recipe: Recipe) -> PeftModel:
    """`model` with changes that are 0 before the first step; they alone learn, in float32."""
    return get_peft_model(
        model,
        LoraConfig(
            r=recipe.lora_r,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=recipe.lora_dropout,
            target_modules=targets(model, recipe.lora_targets),
            task_type="CAUSAL_LM",
        ),
        autocast_adapter_dtype=True,
    )


def save(model: PeftModel, folder: Path, base: str) -> None:
    """The changes alone, as a folder that peft and vLLM read. base: the checkpoint's name."""
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder), save_embedding_layers=False)


def merged(model: PeftModel) -> Any:
    """The model with the changes in its weights."""
    with torch.no_grad():
        whole = model.merge_and_unload()
    forget_packed(whole)
    return whole
