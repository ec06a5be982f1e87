"""What the training loop does where weights learn, all of them or LoRA's, on the same examples in
the same order as a prefix would.

Weights that learn are held in float32, and so are their gradients and Adam's two moments (16 bytes
a parameter); in half precision it is the forward that is computed in it (autocast), as the Trainer
of transformers does, and DeepSpeed with its float32 copy, on which ChatGLM-6B's
ds_train_finetune.sh runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from chat.engine.adapters import KVPrefix
from chat.engine.loading import Loaded, load
from tuning.ptuning.loop import Row, TrainingLoop
from tuning.ptuning.loss import gradient_checkpointing
from tuning.ptuning.proof import Proof, prove
from tuning.ptuning.recipe import FULL, Recipe
from tuning.ptuning.teacher import Lesson
from tuning.ptuning.team import ALONE, Team
from tuning.weights import checkpoint_folder, lora, sharding
from tuning.weights.loss import WeightsLoss

LORA_FOLDER = "lora"  # below the checkpoint's, as peft and vLLM read it


class WeightsTrainer(TrainingLoop):
    """`train()` returns itself when it is done: `save(folder)` writes what has been learnt."""

    _peft: Any = None

    def __init__(
        self,
        loaded: Loaded,
        recipe: Recipe,
        examples: Sequence[dict[str, Any]],
        *arguments: Any,
        initial: None = None,
        beside: Sequence[torch.Tensor] = (),
        keep: Callable[[int, KVPrefix], object] | None = None,
        team: Team = ALONE,
        **options: Any,
    ):
        """As of TrainingLoop. initial, beside: there are none, they are a prefix's. keep: not
        called, for every step would be a checkpoint.
        """
        self._shared_out = recipe.method == FULL and team.size > 1
        super().__init__(loaded, recipe, examples, *arguments, team=team, **options)

    def _prepare(self, examples: Any, probe: torch.Tensor) -> Callable[..., torch.Tensor]:
        model = self.loaded.model
        if self.recipe.method == FULL:
            model.requires_grad_(True)
        else:
            self._peft = lora.wrapped(model, self.recipe)
        loss = WeightsLoss(model, probe)
        if self._shared_out:
            sharding.share_out(loss, self.layers, self.team)
        self._learning = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        return self._autocast(loss)

    def _autocast(self, loss: WeightsLoss) -> Callable[..., torch.Tensor]:
        wanted, device = self._computes_in(), self.loaded.device.type
        if wanted == self.loaded.dtype:
            return loss

        def computed(*arguments: Any) -> torch.Tensor:
            with torch.autocast(device, dtype=wanted):
                return loss(*arguments)

        return computed

    def _computes_in(self) -> torch.dtype:
        """LoRA's base lies in memory as it is computed with; for weights that learn the recipe
        says it, or on a GPU the checkpoint's own half precision.
        """
        if self.recipe.method != FULL:
            return self.loaded.dtype
        if self.recipe.precision != "auto":
            return getattr(torch, self.recipe.precision)
        own = checkpoint_folder.stored_dtype(self.loaded.folder)
        if self.loaded.device.type == "cpu" or (self._shared_out and own == torch.float16):
            return torch.float32
        return own

    def _parameters(self) -> list[torch.nn.Parameter]:
        return list(self._learning.values())

    def _clipped(self, limit: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), limit)
        return sharding.whole(norm).item()

    def _learnt(self) -> dict[str, torch.Tensor]:
        return {name: sharding.whole(one.detach()) for name, one in self._learning.items()}

    @torch.no_grad()
    def _set_learnt(self, learnt: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._learning.items():
            sharding.fill(parameter, learnt[name])

    def _optimizer_state(self) -> dict[str, Any]:
        return sharding.whole_state(self._optimizer.state_dict())

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(sharding.parts_of_state(state, self._parameters()))

    def _to_validate(self) -> None:
        return None

    def _keep_step(self) -> None:
        """Nothing is kept of the steps on the way."""

    def _made(self) -> WeightsTrainer:
        return self

    def _accumulate(self, rows: list[Row], general: list[Lesson]) -> tuple[float, float]:
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(2, device=self.loaded.device)
        batches = list(self._micro_batches(rows, general))
        if self._shared_out:  # every process is part of every forward
            batches = sharding.equally_many(batches, self.team)
        # Of shared weights the gradient is the mean over the processes, each of which has only its
        # rows' share of the loss.
        times = self.team.size if self._shared_out else 1
        self.loaded.model.train()  # dropout, where the base or LoRA has any
        with gradient_checkpointing(self.layers, self.size.replay):
            for batch in batches:
                loss = self.loss(batch, None, batch.weights)
                (loss * times).backward()
                total[int(batch.top_ids is not None)] += loss.detach()
        self.loaded.model.eval()
        self.team.sum(total)
        if not self._shared_out:
            self.team.sum(*(one.grad for one in self._parameters() if one.grad is not None))
        return self.unscaled(*total.tolist())

    # -- what comes of it

    def merge(self) -> Loaded:
        """The tuned model in the precision in which its checkpoint is stored, in the place of the
        base. Nothing can be trained after it.
        """
        del self._optimizer
        model = self.loaded.model
        if self._peft is not None:
            model = lora.merged(self._peft)
        model.requires_grad_(False).eval()
        self.loaded.model = model
        return self.loaded

    def save(self, folder: Path, told: dict[str, Any]) -> None:
        """Writes the tuned model as a checkpoint of its own, and below it what LoRA learnt as peft
        keeps it. told: what its source.json says.
        """
        if self._peft is not None and not self.team.rank:
            lora.save(self._peft, folder / LORA_FOLDER, Path(self.loaded.folder).name)
        changed = self._learnt() if self._shared_out else None
        if self.team.rank:
            return
        model = self.loaded.model if changed else self.merge().model
        checkpoint_folder.write(model, self.loaded, folder, told, changed)

    def prove(self, folder: Path, prompts: Sequence[list[int]]) -> Proof | None:
        """What `save` wrote, loaded as for serving, against the model that was trained. None where
        this process holds parts of it alone, or there is nothing to ask.
        """
        if self._shared_out or not prompts:
            return None
        base = self.loaded
        base.model.to(base.dtype)
        served = load(folder, device=base.device, dtype=base.dtype)
        shape = base.layers, 2, base.kv_heads, 0, base.head_dim
        nothing = torch.zeros(shape, dtype=base.dtype, device=base.device)
        return prove(served, nothing, None, prompts, trained=base.model)
