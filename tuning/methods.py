"""The ways to tune that a run may name (`Run.recipe["method"]`). No torch until a trainer is made.

Another one is a subclass here and a package beside tuning/ptuning/. What it learns must end as a KV
prefix, which is all that is served, and its hyper-parameters as fields of Recipe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from tuning.ptuning import recipe

if TYPE_CHECKING:
    from tuning.ptuning.trainer import Trainer


class Method(ABC):
    name: ClassVar[str]

    @abstractmethod
    def trainer(self, *arguments: Any, **options: Any) -> Trainer:
        """(loaded, recipe, examples, state_folder, report) as tuning.ptuning.trainer.Trainer takes
        them: something with `step`, `trainable_parameters` and `train() -> KVPrefix`.
        """


class PTuningV2(Method):
    name = recipe.METHOD

    def trainer(self, *arguments: Any, **options: Any) -> Trainer:
        from tuning.ptuning.trainer import Trainer

        return Trainer(*arguments, **options)


METHODS: dict[str, Method] = {method.name: method for method in (PTuningV2(),)}
DEFAULT = PTuningV2.name
