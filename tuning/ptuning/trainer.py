"""P-tuning v2: only a prefix learns, the base model is frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chat.engine.adapters import KVPrefix
from chat.engine.loading import Loaded
from tuning.ptuning.batches import front_of_step
from tuning.ptuning.initial import begin
from tuning.ptuning.loop import Row, TrainingLoop
from tuning.ptuning.loss import PrefixLoss, gradient_checkpointing
from tuning.ptuning.prefix import PrefixEncoder
from tuning.ptuning.progress import Progress, Report, Stopped, TrainingFailed
from tuning.ptuning.recipe import METHOD, Recipe
from tuning.ptuning.teacher import Lesson

__all__ = ["Progress", "Report", "Stopped", "Trainer", "TrainingFailed"]


class Trainer(TrainingLoop):
    """`Trainer(...).train()` returns the KV prefix.

    initial: the prefix to go on from, where the recipe's init is an adapter.
    beside: prefixes of the recipe's `beside`, which stand in front in some of the steps.
    keep: given (step, prefix) of each saved step.
    """

    def __init__(
        self,
        loaded: Loaded,
        recipe: Recipe,
        examples: Sequence[dict[str, Any]],
        *arguments: Any,
        initial: torch.Tensor | None = None,
        beside: Sequence[torch.Tensor] = (),
        keep: Callable[[int, KVPrefix], object] | None = None,
        **options: Any,
    ):
        """The others as of TrainingLoop."""
        self._initial, self._keep = initial, keep or (lambda step, prefix: None)
        self._beside = [prefix.to(loaded.device, loaded.dtype) for prefix in beside]
        super().__init__(loaded, recipe, examples, *arguments, **options)

    def _positions(self) -> int:
        return self.recipe.pre_seq_len + max((one.shape[3] for one in self._beside), default=0)

    def _prepare(self, examples: Sequence[dict[str, Any]], probe: torch.Tensor) -> PrefixLoss:
        recipe, loaded = self.recipe, self.loaded
        self.encoder = PrefixEncoder(
            pre_seq_len=recipe.pre_seq_len,
            layers=loaded.layers,
            kv_heads=loaded.kv_heads,
            head_dim=loaded.head_dim,
            projection=recipe.prefix_projection,
            hidden_size=loaded.model.config.get_text_config().hidden_size,
            freeze_first=recipe.freeze_first,
        )
        begin(self.encoder, loaded, recipe, examples, self._initial)
        self.encoder.to(loaded.device)
        return PrefixLoss(loaded.model, probe)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return list(self.encoder.parameters())

    def _learnt(self) -> dict[str, torch.Tensor]:
        return self.encoder.state_dict()

    def _set_learnt(self, learnt: dict[str, torch.Tensor]) -> None:
        self.encoder.load_state_dict(learnt)

    def _to_validate(self) -> torch.Tensor:
        return self.encoder().to(self.loaded.dtype)

    def _keep_step(self) -> None:
        if not self.team.rank:
            self._keep(self.step, self.kv_prefix())

    def _made(self) -> KVPrefix:
        return self.kv_prefix()

    @torch.no_grad()
    def kv_prefix(self) -> KVPrefix:
        """What has been learnt so far, in the dtype in which the base model saw it."""
        return KVPrefix(
            tensor=self.encoder().to(self.loaded.dtype).cpu().contiguous(),
            shifts_positions=self.loaded.shifts_positions,
            checkpoint_fingerprint=self.loaded.fingerprint,
            metadata={"method": METHOD, "step": self.best_step, "recipe": self.recipe.as_dict()},
        )

    def _accumulate(self, rows: list[Row], general: list[Lesson]) -> tuple[float, float]:
        self._optimizer.zero_grad(set_to_none=True)
        prefix = self.encoder()
        # Micro-batches add their gradients up at this leaf; the encoder's own backward runs once.
        leaf = prefix.detach().to(self.loaded.dtype).requires_grad_()
        total = torch.zeros(2, device=self.loaded.device)
        leaf_gradient = torch.zeros_like(prefix)
        recipe = self.recipe
        front = front_of_step(self.step, len(self._beside), recipe.beside_share, recipe.seed)
        with gradient_checkpointing(self.layers, self.size.replay):
            for batch in self._micro_batches(rows, general):
                whole = leaf
                if front is not None and batch.top_ids is None:  # the base's answers have none
                    whole = torch.cat((self._beside[front], leaf), dim=3)
                loss = self.loss(batch, whole, batch.weights, self.recipe.prefix_dropout)
                (gradient,) = torch.autograd.grad(loss, leaf)
                leaf_gradient += gradient
                total[int(batch.top_ids is not None)] += loss.detach().to(total.device)
        self.team.sum(leaf_gradient, total)
        prefix.backward(leaf_gradient)
        return self.unscaled(*total.tolist())
