"""ChatGLM-6B computed as its original code does: the baseline of tests/bench/chatglm.py, which says
how it was made.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from chat.chatglm import ChatGLMForConditionalGeneration
from chat.chatglm.positions import position_ids, prefix_lm_hidden


class ReferenceStyle:
    """The forward pass as the original writes it: [seq, batch, hidden], baddbmm, explicit masks,
    fp32 softmax.
    """

    def __init__(self, model: ChatGLMForConditionalGeneration):
        self.config = model.config
        self.weights = dict(model.named_parameters())
        self.embedding = self.weights["transformer.word_embeddings.weight"]
        self.frequencies = (
            (1.0 / 10000 ** (torch.arange(0, self.half, 2) / self.half)).half().float()
        )

    @property
    def half(self) -> int:
        return self.config.head_dim // 2

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        size = (self.config.hidden_size,)
        return functional.layer_norm(
            x, size, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-5
        )

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [seq, batch, heads, half]; positions [seq, batch]. A table up to the largest position,
        then a look-up.
        """
        table = torch.outer(torch.arange(int(positions.max()) + 1).float(), self.frequencies)
        table = torch.cat((table, table), dim=-1)
        cos, sin = (
            functional.embedding(positions, part)[:, :, None] for part in (table.cos(), table.sin())
        )
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def _layer(
        self, index: int, x: Tensor, positions: Tensor, mask: Tensor | None, past: Tensor | None
    ):
        stem, heads = f"transformer.layers.{index}", self.config.num_attention_heads
        normed = self._norm(f"{stem}.input_layernorm", x)
        length, batch, _ = normed.shape
        fused = self._linear(f"{stem}.attention.query_key_value", normed).view(
            length, batch, heads, -1
        )
        query, key, value = fused.chunk(3, dim=-1)
        turned = []
        for side in (query, key):
            parts = side.chunk(2, dim=-1)
            turned.append(
                torch.cat(
                    [self._turn(part, positions[:, row].T) for row, part in enumerate(parts)],
                    dim=-1,
                )
            )
        query, key = turned
        if past is not None:
            key, value = torch.cat((past[0], key)), torch.cat((past[1], value))
        present = torch.stack((key, value))
        query = query / (math.sqrt(self.config.head_dim) * (index + 1))
        keys = key.shape[0]
        query, key = query.reshape(length, batch * heads, -1), key.reshape(keys, batch * heads, -1)
        scores = torch.baddbmm(
            torch.zeros(1, 1, 1),
            query.transpose(0, 1),
            key.transpose(0, 1).transpose(1, 2),
            beta=0.0,
        ).view(batch, heads, length, keys)
        if mask is not None and bool(mask.any()):
            scores = scores.masked_fill(mask, -10000.0)
        weights = (scores.float() * (index + 1)).softmax(-1).view(batch * heads, length, keys)
        context = torch.bmm(weights, value.reshape(keys, batch * heads, -1).transpose(0, 1))
        context = (
            context.view(batch, heads, length, -1).permute(2, 0, 1, 3).reshape(length, batch, -1)
        )
        alpha = math.sqrt(56)
        x = alpha * normed + self._linear(f"{stem}.attention.dense", context)
        normed = self._norm(f"{stem}.post_attention_layernorm", x)
        inner = functional.gelu(
            self._linear(f"{stem}.mlp.dense_h_to_4h", normed), approximate="tanh"
        )
        return alpha * normed + self._linear(f"{stem}.mlp.dense_4h_to_h", inner), present

    def __call__(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, past=None, replay: bool = False
    ):
        """Logits of every position [batch, seq, vocabulary], and the layers' [2, seq, batch, heads,
        dim].
        """
        x = functional.embedding(ids, self.embedding).transpose(0, 1).contiguous()
        if replay:
            x.requires_grad_()
        if mask is not None and past is not None:
            mask = functional.pad(mask, (past[0].shape[1], 0))
        presents = []
        for index in range(self.config.num_layers):
            arguments = (index, x, positions, mask, None if past is None else past[index])
            x, present = (
                checkpoint(self._layer, *arguments, use_reentrant=False)
                if replay
                else self._layer(*arguments)
            )
            presents.append(present)
        x = self._norm("transformer.final_layernorm", x)
        return functional.linear(x, self.embedding).transpose(0, 1).contiguous(), presents

    def start(self, ids: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        row = torch.tensor([ids])
        return row, position_ids(row, self.config), prefix_lm_hidden(row, self.config)

    @torch.no_grad()
    def generate(
        self, ids: list[int], new: int, prefix: list[Tensor] | None = None, sample: bool = False
    ) -> list[int]:
        row, positions, mask = self.start(ids)
        logits, past = self(row, positions, mask, prefix)
        answer = []
        for step in range(new):
            scores = logits[0, -1]
            answer.append(_draw(scores) if sample else int(scores.argmax()))
            if step + 1 < new:
                positions = positions[:, :, -1:] + torch.tensor([[[0], [1]]])
                logits, past = self(torch.tensor([[answer[-1]]]), positions, None, past)
        return answer


def _draw(scores: Tensor) -> int:
    """temperature 0.95, top_k 50, top_p 0.7."""
    values, order = (scores / 0.95).topk(min(50, len(scores)))
    chances = values.softmax(-1)
    chances = chances.masked_fill(chances.cumsum(-1) - chances > 0.7, 0.0)
    return int(order[torch.multinomial(chances, 1)])
