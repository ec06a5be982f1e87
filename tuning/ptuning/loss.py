"""The loss of a frozen language model under a prefix, with logits only where there are labels.

With ChatGLM-6B's 130,528 words the output layer is most of the work of short examples, and its
logits most of the memory. The output layer is frozen, so its gradient with respect to its input is
taken right away, some rows at a time: at no moment are there logits of more than `LOGITS_BYTES`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from tuning.ptuning.batches import MicroBatch
from tuning.ptuning.prefix import TrainingPrefixCache
from tuning.ptuning.teacher import divergence

LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}


class Goal:
    """What the predictions of a micro-batch are measured against: its targets, or the base's own
    distribution where the batch brings one.
    """

    def __init__(self, batch: MicroBatch, device: torch.device):
        self._targets = batch.targets.to(device)
        self._top = None
        if batch.top_ids is not None and batch.top_logprobs is not None:
            self._top = batch.top_ids.to(device), batch.top_logprobs.to(device)

    def losses(self, logits: torch.Tensor, part: slice = slice(None)) -> torch.Tensor:
        """[n] float32 of logits [n, vocabulary], which belong to the predictions `part`."""
        if self._top is not None:
            return divergence(logits, self._top[0][part], self._top[1][part])
        return cross_entropy(logits.float(), self._targets[part], reduction="none")


def _summed(values: torch.Tensor, owners: torch.Tensor | None, count: int) -> torch.Tensor:
    """The sum of values [n]; with owners [n] one sum for each of `count` owners."""
    if owners is None:
        return values.sum()
    return values.new_zeros(count).index_add(0, owners, values)


class _FrozenHeadLoss(torch.autograd.Function):
    """sum(weights * losses(head(hidden))) in float32, its gradient computed beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        goal: Goal,
        weights: torch.Tensor,
        head: nn.Module,
        rows: int,
        owners: torch.Tensor | None,
        count: int,
    ) -> torch.Tensor:
        """hidden [n, hidden_size], weights [n]; `rows` at a time. owners, count: as of _summed."""
        gradient = torch.empty_like(hidden)
        shape = () if owners is None else (count,)
        total = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                some = hidden[part].detach().requires_grad_()
                losses = goal.losses(head(some), part) * weights[part]
                (gradient[part],) = torch.autograd.grad(losses.sum(), some)
            total += _summed(losses.detach(), None if owners is None else owners[part], count)
        ctx.save_for_backward(gradient)
        ctx.owners = owners
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        factor = upstream if ctx.owners is None else upstream[ctx.owners, None]
        return gradient * factor.to(gradient.dtype), None, None, None, None, None, None


class PrefixLoss:
    """Weighted loss of a micro-batch behind a prefix. Which way is taken is found out with one
    example, not assumed.
    """

    def __init__(self, model: Any, probe: torch.Tensor):
        """probe [1, length]: token ids of one example."""
        self._model = model
        self._base, self._head = model.base_model, model.get_output_embeddings()
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._is_plain = self._head is not None and self._base is not model and self._plain(probe)
        rows_bytes = 4 * model.get_input_embeddings().weight.shape[0]
        self._rows = max(1, LOGITS_BYTES.get(probe.device.type, 512 << 20) // rows_bytes)

    @torch.no_grad()
    def _plain(self, probe: torch.Tensor) -> bool:
        """Are the model's logits its output layer on its last hidden state, and nothing else (no
        scaling, no soft cap)?
        """
        hidden = self._base(input_ids=probe, use_cache=False).last_hidden_state
        if hidden.shape[:2] != probe.shape:
            return False
        logits = self._model(input_ids=probe, use_cache=False).logits.float()
        return torch.allclose(
            self._head(hidden).float(), logits, rtol=1e-3, atol=1e-3 * logits.abs().max().item()
        )

    def __call__(
        self,
        batch: MicroBatch,
        prefix: torch.Tensor,
        weights: torch.Tensor,
        dropout: float = 0.0,
        count: int = 1,
    ) -> torch.Tensor:
        """Scalar float32; prefix [layers, 2, kv_heads, pre_seq_len, head_dim] in the model's dtype,
        weights [n]. Where the batch's rows stand behind `count` prefixes: [count], a loss for
        each; prefix then has one for every row, as TrainingPrefixCache takes them.
        """
        arguments = {
            "input_ids": batch.input_ids,
            "past_key_values": TrainingPrefixCache(prefix, batch.input_ids.shape[0], dropout),
            "use_cache": True,
        }
        owners = batch.owners
        if self._is_plain:
            hidden = self._base(**arguments).last_hidden_state
            some = hidden.flatten(0, 1)[batch.positions.to(hidden.device)]
            goal, weights = Goal(batch, some.device), weights.to(some.device)
            if not torch.is_grad_enabled():
                return self._without_gradient(some, goal, weights)
            if owners is not None:
                owners = owners.to(some.device)
            return _FrozenHeadLoss.apply(some, goal, weights, self._head, self._rows, owners, count)
        length = batch.input_ids.shape[1]
        columns = (batch.positions % length).unique()
        if self._keeps:
            logits = self._model(**arguments, logits_to_keep=columns).logits
        else:
            logits = self._model(**arguments).logits[:, columns]
        rows, where = (
            batch.positions // length,
            torch.searchsorted(columns, batch.positions % length),
        )
        some = logits[rows.to(logits.device), where.to(logits.device)]
        losses = Goal(batch, some.device).losses(some) * weights.to(some.device)
        return _summed(losses, owners if owners is None else owners.to(some.device), count)

    def _without_gradient(
        self, hidden: torch.Tensor, goal: Goal, weights: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), self._rows):
            part = slice(start, start + self._rows)
            total += (goal.losses(self._head(hidden[part]), part) * weights[part]).sum()
        return total


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of the model's `count` layers."""
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of {count} layers")
    return lists[0]


@contextmanager
def gradient_checkpointing(layers: nn.ModuleList, on: bool) -> Iterator[None]:
    """Layers keep only their input and are computed again in the backward pass.

    transformers' own switch drops the past that the prefix is given as (and peft refuses,
    peft#869): TrainingPrefixCache may be replayed.
    """

    def replayed(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **named: checkpoint(
            forward, *arguments, use_reentrant=False, **named
        )

    for layer in layers if on else ():
        layer.forward = replayed(layer.forward)
    try:
        yield
    finally:
        for layer in layers if on else ():
            del layer.forward
