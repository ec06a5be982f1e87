"""The families of models that are served and tuned. Adding one: a module beside these, its instance
in FAMILIES, a tiny model in tests/support/tiny_models.py. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chat.engine.families.causal import Causal
from chat.engine.families.chatglm import ChatGLM
from chat.engine.families.family import Family

__all__ = ["FAMILIES", "Family", "family_named", "family_of"]

# asked in this order; the last is whatever else transformers can load
FAMILIES: tuple[Family, ...] = (ChatGLM(), Causal())


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a folder's config.json; None when it is of none that is known here."""
    return next((family for family in FAMILIES if family.recognises(config)), None)


def family_named(name: str | None) -> Family:
    """By the name in Checkpoint.description. Rows of other servers have none: the ordinary one."""
    return next((family for family in FAMILIES if family.name == name), FAMILIES[-1])
