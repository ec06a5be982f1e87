"""What distinguishes one family of models from another, in one object. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from chat.engine.positions import Positions
from chat.engine.prompts import Prompter


class Family(ABC):
    """One instance per family, in chat.engine.families.FAMILIES."""

    # kept in Checkpoint.description["family"], so that the web tier asks the row
    name: ClassVar[str]
    # Where a prefix stands before the prompt, does the first position move by its length (peft's
    # rule)?
    shifts_positions: ClassVar[bool]
    # The prompt sees itself in both directions, so it is prefilled in one piece and never reused.
    bidirectional_prompt: ClassVar[bool]
    can_quantize: ClassVar[bool]  # packing plain weights at 4 or 8 bits on loading
    presets_key: ClassVar[str]  # of tuning.plan.PRESETS: where a new run begins

    @abstractmethod
    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Does a folder with this config.json belong to the family?"""

    @abstractmethod
    def prompter(self, tokenizer: Any, config: Any, generation_config: Any = None) -> Prompter:
        """Text to tokens and back; config: a transformers configuration."""

    @abstractmethod
    def positions(self, config: Any) -> Positions: ...

    def register(self) -> None:  # noqa: B027  most families need nothing
        """Makes transformers' Auto classes know the family."""

    def tokenizer_fault(self, tokenizer: Any, config: Any) -> str:
        """Why this tokenizer cannot be the checkpoint's; empty: it can."""
        return ""
