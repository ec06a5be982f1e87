"""The families of models that are served and tuned. Adding one: a module beside these, its instance
in FAMILIES, a tiny model in tests/support/tiny_models.py. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from chat.engine.families.causal import Causal
from chat.engine.families.chatglm import ChatGLM
from chat.engine.families.family import Family
from chat.engine.prompts import Prompter

__all__ = ["FAMILIES", "Family", "family_named", "family_of", "load_prompter"]

# asked in this order; the last is whatever else transformers can load
FAMILIES: tuple[Family, ...] = (ChatGLM(), Causal())


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a folder's config.json; None when it is of none that is known here."""
    return next((family for family in FAMILIES if family.recognises(config)), None)


def family_named(name: str | None) -> Family:
    """By the name in Checkpoint.description. Rows of other servers have none: the ordinary one."""
    return next((family for family in FAMILIES if family.name == name), FAMILIES[-1])


def load_prompter(folder: str | Path) -> Prompter:
    """The prompter of a checkpoint folder, without its weights and without torch, of families that
    transformers knows. Raises what transformers raises on files that are missing or broken.
    """
    from transformers import AutoTokenizer

    config, generation_config = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for path in (Path(folder, "config.json"), Path(folder, "generation_config.json"))
    )
    tokenizer = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    family = family_of(config) or FAMILIES[-1]
    return family.prompter(
        tokenizer, SimpleNamespace(**config), SimpleNamespace(**generation_config)
    )
