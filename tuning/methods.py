"""The ways to tune that a run may name (`Recipe.method`). No torch until a trainer is made.

Another one is a subclass here and a package beside tuning/ptuning/, its hyper-parameters fields of
Recipe. What it learns ends as a KV prefix, which the engine serves in front of any prompt, or as a
checkpoint of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tuning.ptuning import recipe
from tuning.ptuning.recipe import Recipe

if TYPE_CHECKING:
    from tuning.ptuning.loop import TrainingLoop
    from tuning.ptuning.proof import Proof

Prompts = Sequence[list[int]]


class Method(ABC):
    name: ClassVar[str]
    makes: ClassVar[str]  # "adapter" or "checkpoint"

    def precision(self, plan: Recipe) -> str | None:
        """In which the base is loaded; None: its own, or what the processor computes in."""
        return None if plan.precision == "auto" else plan.precision

    @abstractmethod
    def trainer(self, *arguments: Any, **options: Any) -> TrainingLoop:
        """(loaded, recipe, examples, state_folder, report) as tuning.ptuning.loop takes them, with
        what a prefix has besides (tuning.ptuning.trainer).
        """

    @abstractmethod
    def write(
        self,
        trainer: TrainingLoop,
        learnt: Any,
        folder: Path,
        told: dict[str, Any],
        prompts: Prompts,
    ) -> Proof | None:
        """What `train()` returned as files in `folder`, with `told` of where it comes from, and the
        proof that they answer `prompts` as the trainer does. Called in every process of a run; the
        first one writes.
        """


class PTuningV2(Method):
    name, makes = recipe.METHOD, "adapter"

    def trainer(self, *arguments: Any, **options: Any) -> TrainingLoop:
        from tuning.ptuning.trainer import Trainer

        return Trainer(*arguments, **options)

    def write(
        self,
        trainer: TrainingLoop,
        learnt: Any,
        folder: Path,
        told: dict[str, Any],
        prompts: Prompts,
    ) -> Proof | None:
        from chat.engine import adapters
        from chat.engine.request import AdapterRef
        from tuning.ptuning.proof import prove

        if trainer.team.rank:
            return None
        learnt.metadata |= told
        served = AdapterRef(adapters.save(learnt, folder), str(folder))
        return prove(trainer.loaded, learnt.tensor, served, prompts) if prompts else None


class _Weights(Method):
    makes = "checkpoint"

    def trainer(self, *arguments: Any, **options: Any) -> TrainingLoop:
        from tuning.weights.trainer import WeightsTrainer

        return WeightsTrainer(*arguments, **options)

    def write(
        self,
        trainer: TrainingLoop,
        learnt: Any,
        folder: Path,
        told: dict[str, Any],
        prompts: Prompts,
    ) -> Proof | None:
        learnt.save(folder, told)
        return None if trainer.team.rank else learnt.prove(folder, prompts)


class Full(_Weights):
    name = recipe.FULL

    def precision(self, plan: Recipe) -> str | None:
        return "float32"  # what learns; the forward's is the recipe's


class LoRA(_Weights):
    name = recipe.LORA


METHODS: dict[str, Method] = {method.name: method for method in (PTuningV2(), Full(), LoRA())}
