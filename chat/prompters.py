"""The text side of a checkpoint folder, read with as little as it needs. No Django."""

from __future__ import annotations

from functools import lru_cache

from chat.checkpoints.describe import CheckpointInvalid, read_config
from chat.engine.families import FAMILIES, Family, family_of
from chat.engine.prompts import Prompter


@lru_cache(maxsize=2)
def prompter_of(folder: str) -> Prompter:
    """The prompter that serving and training have. Raises CheckpointInvalid."""
    family = family_of(read_config(folder)) or FAMILIES[-1]
    if type(family).register is not Family.register:  # classes of ours, which need torch
        from chat.engine.loading import load_prompter
    else:
        from chat.engine.prompt_process import load_prompter
    try:
        return load_prompter(folder)
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise CheckpointInvalid(
            "tokenizer_missing", f"the tokenizer cannot be loaded: {fault}"
        ) from fault
