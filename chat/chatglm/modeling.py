"""ChatGLM-6B (v1.1.0) on transformers 5: the same numbers, no remote code (docs/chatglm.md).

One forward serves `generate`, the engine and the trainer. Module names are the published
checkpoint's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from chat.ops.cpu_linear import frozen_linear

from .configuration import ChatGLMConfig
from .positions import additive, position_ids, prefix_lm_hidden, rotary_tables, rotate
from .pretrained import ChatGLMPreTrainedModel
from .quantization import linear

# The residual branch's weight: sqrt(2 * 28). The original never hands the number of layers to its
# blocks, so it is that of the 28-layer model at any depth (docs/chatglm.md#2-layers).
RESIDUAL_SCALE = math.sqrt(2 * 28)


class ChatGLMAttention(nn.Module):
    """Multi-head attention with 2-D rotary positions.

    The original divides queries by (layer + 1) and multiplies the scores again in fp32, against
    fp16 overflow. Torch's SDPA keeps scores in fp32 throughout, on CPU and GPU alike, so the
    factor, which cancels, is left out.
    """

    def __init__(self, config: ChatGLMConfig, layer_index: int):
        super().__init__()
        self.layer_index, self.heads, self.head_dim = (
            layer_index,
            config.num_attention_heads,
            config.head_dim,
        )
        self.query_key_value = linear(config, config.hidden_size, 3 * config.hidden_size)
        self.dense = linear(config, config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden: Tensor,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
        past: tuple[Tensor, Tensor] | None,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = hidden.shape
        fused = self.query_key_value(hidden).view(batch, length, self.heads, 3, self.head_dim)
        query, key = rotate(fused[..., :2, :], tables).permute(3, 0, 2, 1, 4)
        value = fused[..., 2, :].transpose(1, 2)
        if past is not None:
            key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        elif cache is not None:
            key, value = cache.update(key, value, self.layer_index)
        if want_weights:
            scores = (query.float() @ key.float().transpose(-1, -2)) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1).to(value.dtype)
            context = weights @ value
        else:
            weights = None
            context = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.dense(context.transpose(1, 2).reshape(batch, length, -1)), weights


class ChatGLMFeedForward(nn.Module):
    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = linear(config, config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = linear(config, config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(hidden), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    """One layer (docs/chatglm.md#2-layers): the residual is the normalised input, scaled."""

    def __init__(self, config: ChatGLMConfig, layer_index: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_index)
        self.post_attention_layernorm = nn.LayerNorm(
            config.hidden_size, eps=config.layernorm_epsilon
        )
        self.mlp = ChatGLMFeedForward(config)

    def forward(
        self,
        hidden: Tensor,
        past_key: Tensor | None,
        past_value: Tensor | None,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """past_key, past_value: what stands before these tokens, when it is given as tensors and
        not in `cache`: positional, so that either kind of gradient checkpointing differentiates
        through them.
        """
        past = None if past_key is None else (past_key, past_value)
        normed = self.input_layernorm(hidden)
        attended, weights = self.attention(normed, tables, mask, cache, past, want_weights)
        normed = self.post_attention_layernorm(torch.add(attended, normed, alpha=RESIDUAL_SCALE))
        return torch.add(self.mlp(normed), normed, alpha=RESIDUAL_SCALE), weights


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The transformer without its head. Outputs are batch first (the original's hidden states are
    sequence first).
    """

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [ChatGLMBlock(config, index) for index in range(config.num_layers)]
        )
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        input_ids: [b, s]. attention_mask: None (built from the ids, every token visible, as
            the original), 2-D [b, any] of 1 and 0 = padding on either side, 4-D bool [b, 1, s, k]
            with True = HIDDEN (the original's convention), or 4-D float to add to the scores
            (transformers' convention). 2-D and bool masks may leave out entries that stand first in
            the cache, such as a prefix: those are visible. A float mask is taken as it is and must
            span the cache.
        position_ids: [b, 2, s]; None: from the ids, which must then hold the whole prompt.
        past_key_values: a Cache (keys after rotary), [b, heads, seq, head_dim] a layer. A KV prefix
            stands first in it and shifts no position. It is left unchanged under gradient
            checkpointing.
        inputs_embeds: [b, s, hidden] instead of ids, together with position_ids and a 4-D
            attention_mask. hidden_states: embedding, then what each layer but the last leaves,
            then the final layer norm's output. attentions: [b, heads, s, k] a layer.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask = self._mask(attention_mask, input_ids, hidden, past_key_values)
        tables = rotary_tables(
            self._positions(position_ids, attention_mask, input_ids),
            self.config.head_dim,
            hidden.dtype,
        )

        states: list[Tensor] = []  # what each layer starts from
        attentions: list[Tensor] = []
        frozen = self._frozen_past(past_key_values, len(hidden)) if self._checkpoints() else None
        cache = past_key_values if frozen is None else None
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                states.append(hidden)
            past_key, past_value = (None, None) if frozen is None else frozen[index]
            hidden, weights = layer(
                hidden,
                past_key,
                past_value,
                tables=tables,
                mask=mask,
                cache=cache,
                want_weights=bool(output_attentions),
            )
            if output_attentions:
                attentions.append(weights)
        hidden = self.final_layernorm(hidden)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if return_dict is not False else output.to_tuple()

    def _checkpoints(self) -> bool:
        return self.training and any(layer.gradient_checkpointing for layer in self.layers)

    def _frozen_past(
        self, cache: Cache | None, batch: int
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """The cache's content as tensors, [b, heads, P, head_dim]: recomputing a layer must not
        append to a cache twice.
        """
        if cache is None:
            return [(None, None)] * len(self.layers)
        rows = [(layer.keys, layer.values) for layer in cache.layers[: len(self.layers)]]
        if len(rows) < len(self.layers) or any(
            keys is None or not keys.numel() for keys, _ in rows
        ):
            return [(None, None)] * len(self.layers)
        return [
            (keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1))
            for keys, values in rows
        ]

    def _positions(
        self, positions: Tensor | None, attention_mask: Tensor | None, input_ids: Tensor | None
    ) -> Tensor:
        if positions is not None:
            if positions.dim() != 3 or positions.shape[1] != 2:
                raise ValueError(
                    f"position_ids must be [batch, 2, sequence], not {list(positions.shape)}"
                )
            return positions
        if input_ids is None:
            raise ValueError("inputs_embeds need position_ids")
        return position_ids(
            input_ids, self.config, self._visible(attention_mask, input_ids.shape[1])
        )

    @staticmethod
    def _visible(attention_mask: Tensor | None, length: int) -> Tensor | None:
        """[b, s]: the part of a 2-D mask that speaks of these tokens."""
        return (
            attention_mask[:, -length:]
            if attention_mask is not None and attention_mask.dim() == 2
            else None
        )

    def _mask(
        self,
        attention_mask: Tensor | None,
        input_ids: Tensor | None,
        hidden: Tensor,
        cache: Cache | None,
    ) -> Tensor | None:
        """The mask to add to the scores, [b, 1, s, k], or None when all is visible."""
        if cache is not None and cache.is_compileable:
            # its keys end in unused room, which masks here do not speak of, and transformers' masks
            # for it are causal
            raise ValueError(
                "ChatGLM needs a cache that grows with its tokens, such as DynamicCache, not a "
                "static one"
            )
        length = hidden.shape[1]
        if attention_mask is not None and attention_mask.dim() == 4:
            if attention_mask.dtype != torch.bool:
                return attention_mask.to(hidden.dtype)
            unseen = attention_mask
        elif length == 1:
            if attention_mask is None:
                return None
            unseen = (attention_mask == 0)[:, None, None, :]
        elif input_ids is None:
            raise ValueError("inputs_embeds need a 4-D attention_mask")
        else:
            unseen = prefix_lm_hidden(input_ids, self.config, self._visible(attention_mask, length))
            if (
                attention_mask is not None
                and attention_mask.dim() == 2
                and attention_mask.shape[1] > length
            ):
                earlier = (attention_mask[:, :-length] == 0)[:, None, None, :]
                unseen = torch.cat((earlier.expand(-1, -1, length, -1), unseen), dim=-1)
        keys = length if cache is None else cache.get_mask_sizes(length, 0)[0]
        if unseen.shape[-1] > keys:
            raise ValueError(
                f"attention_mask speaks of {unseen.shape[-1]} entries, but there are {keys} keys"
            )
        return additive(functional.pad(unseen, (keys - unseen.shape[-1], 0)), hidden.dtype)


class TiedHead(nn.Module):
    """The output projection, which has no weights of its own: it is the embedding, transposed
    (docs/chatglm.md#5-head-and-loss).

    Official files repeat the embedding as lm_head.weight; without a parameter of that name it is
    not even read.
    """

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self._embedding = [embedding]  # in a list: a reference, not a submodule

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def forward(self, hidden: Tensor) -> Tensor:
        return frozen_linear(hidden.to(self.weight.device), self.weight)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = TiedHead(self.transformer.word_embeddings)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.word_embeddings

    def get_output_embeddings(self) -> TiedHead:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As `ChatGLMModel.forward`, and:

        labels: [b, s], -100 = no loss. loss: fp32 mean cross-entropy of the next token.
        logits_to_keep: 0 all positions, n the last n, or a tensor of positions; logits are [b,
        kept, vocabulary].
        """
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        kept = (
            slice(-logits_to_keep, None)
            if isinstance(logits_to_keep, int) and logits_to_keep
            else logits_to_keep
        )
        hidden = output.last_hidden_state
        logits = self.lm_head(hidden if isinstance(kept, int) else hidden[:, kept])
        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ValueError(
                    f"labels for {labels.shape[1]} positions, but logits_to_keep keeps "
                    f"{logits.shape[1]}"
                )
            scores = logits[:, :-1].float().flatten(0, 1)
            loss = functional.cross_entropy(
                scores, labels[:, 1:].flatten().to(scores.device), ignore_index=-100
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if return_dict is not False else result.to_tuple()

    # Generation

    def generate(
        self, inputs: Tensor | None = None, *args, attention_mask: Tensor | None = None, **kwargs
    ):
        """transformers' `generate`, which also takes the 4-D masks that ChatGLM's tokenizer makes.

        Such a mask is reduced to the padding it shows: a column hidden from every row. The
        prefix-LM part follows from the ids again.
        """
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = (~attention_mask.all(dim=2)[:, 0]).long()
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        return super().generate(inputs, *args, **kwargs)

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict
    ) -> Tensor:
        ids = model_kwargs.get("input_ids", inputs_tensor)
        mask = model_kwargs.get("attention_mask")
        return position_ids(ids, self.config, None if mask is None else mask[:, -ids.shape[1] :])

    @staticmethod
    def _expand_inputs_for_generation(
        expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs
    ):
        """Beams: transformers takes 3-D positions for [axes, batch, s] and would repeat the wrong
        dimension.
        """
        if expand_size == 1:
            return input_ids, model_kwargs
        expanded = {
            name: value.repeat_interleave(expand_size, dim=0)
            if isinstance(value, Tensor)
            else value
            for name, value in model_kwargs.items()
        }
        return None if input_ids is None else input_ids.repeat_interleave(
            expand_size, dim=0
        ), expanded

    def _update_model_kwargs_for_generation(
        self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1
    ):
        positions = model_kwargs.pop("position_ids", None)
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs,
            model_kwargs,
            is_encoder_decoder=is_encoder_decoder,
            num_new_tokens=num_new_tokens,
        )
        if positions is not None:
            step = torch.arange(1, num_new_tokens + 1, device=positions.device)
            grown = positions[..., -1:] + torch.stack((torch.zeros_like(step), step))
            model_kwargs["position_ids"] = torch.cat((positions, grown), dim=-1)
        return model_kwargs
