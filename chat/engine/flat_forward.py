"""A forward of our own for the usual decoder on a CPU: tokens of any rows in one flat list.

The layers of Llama, Mistral, Qwen2 and Qwen3 are the same six steps. Here their projections are
fused (queries, keys and values; gate and up) and packed for oneDNN, what lies between them is
compiled (chat/ops/cpu_kernels.cpp), and a prefix is read where it lies: rows of one adapter look at
one copy of its keys and values, which are never written into the cache. Positions' sines are
computed once a forward, logits only where a token is drawn. Other models, devices and machines
without a compiler go through the model's ordinary forward (prefill.py, cuda_graphs.py).
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Several

import torch
from torch import Tensor, nn

from chat.engine.capacity import free_memory
from chat.engine.kv_cache import KVCache
from chat.engine.loading import UNKNOWN, Loaded
from chat.ops import cpu_kernels
from chat.ops.cpu_linear import PackedProduct, plainly, products_work
from chat.ops.weight_only import is_packed

log = logging.getLogger(__name__)

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
PACKING_SHARE = 0.3  # of free memory that the packed projections may take


class FlatForward:
    """One model's. Its weights stay where they are; packed copies of them belong to this object."""

    def __init__(self, loaded: Loaded, kernels: cpu_kernels.Kernels):
        model, config = loaded.model, loaded.model.config
        self._kernels, self._dtype = kernels, loaded.dtype
        self._body, self._layers = model.model, list(model.model.layers)
        self._heads, self._kv_heads = config.num_attention_heads, loaded.kv_heads
        self._dim, self._hidden = loaded.head_dim, config.hidden_size
        self._inner = config.intermediate_size
        self._epsilon = config.rms_norm_eps
        weights = [
            weight
            for module in model.modules()
            if isinstance(module, nn.Linear)
            for weight in [module.weight]
        ]
        room = PACKING_SHARE * free_memory(torch.device("cpu"))
        pack = sum(weight.nbytes for weight in weights) <= room
        self._products = [
            (
                PackedProduct([layer.self_attn.q_proj, layer.self_attn.k_proj,
                               layer.self_attn.v_proj], pack),
                PackedProduct([layer.self_attn.o_proj], pack),
                PackedProduct([layer.mlp.gate_proj, layer.mlp.up_proj], pack),
                PackedProduct([layer.mlp.down_proj], pack),
            )
            for layer in self._layers
        ]  # fmt: skip
        self._logits = PackedProduct([model.lm_head], pack)
        norms = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in self._layers]
        self._norms = [tuple(norm.weight.float() for norm in pair) for pair in norms]
        self._last_norm = self._body.norm.weight.float()
        self._head_norms = [self._head_norm(layer.self_attn) for layer in self._layers]
        # a cache, how wide it was, and where its layers were then
        self._layout: tuple[Callable[[], KVCache | None], int, list[cpu_kernels.Layer]]
        self._layout = (lambda: None, 0, [])
        self._addresses: list[int] = []

    @staticmethod
    def _head_norm(attention: nn.Module) -> tuple[Tensor | None, Tensor | None, float]:
        """Weights for queries and keys, and epsilon."""
        query, key = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        if query is None or key is None:
            return None, None, 0.0
        return query.weight.float(), key.weight.float(), query.variance_epsilon

    def run(
        self,
        cache: KVCache,
        ids: Several[int],
        positions: Several[int],
        rows: Several[int],
        columns: Several[int],
        prefixes: Several[Tensor | None],
        wanted: Several[int],
        biases: Several[float] = (),
    ) -> Tensor:
        """Token ids[i] stands at positions[i] and takes columns[i] of the cache's row rows[i],
        behind prefixes[i] ([layers, 2, kv_heads, length, head_dim] in the model's dtype).

        biases[i] (none: 0) is added to the scores of its prefix (PositionPlan.prefix_bias).
        Tokens of one row stand together, in order; those of one prefix too. Logits
        [len(wanted), vocabulary] of the tokens with the indices `wanted`.
        """
        count, kernels = len(ids), self._kernels
        numbers = torch.tensor([*ids, *positions, *rows, *columns]).view(4, count)
        residual = nn.functional.embedding(numbers[0], self._body.embed_tokens.weight).float()
        cosine, sine = (
            part.float().contiguous() for part in self._body.rotary_emb(residual, numbers[1][None])
        )
        lengths = torch.tensor([0 if each is None else each.shape[3] for each in prefixes])
        addresses = torch.tensor([0 if each is None else each.data_ptr() for each in prefixes])
        bias = torch.tensor(biases) if any(biases) else None
        scratch = torch.empty(count * self._heads * (2 * self._dim + 2))
        threads = torch.get_num_threads()
        forward = cpu_kernels.Forward(
            count, self._heads, self._kv_heads, self._dim, threads,
            numbers[2].data_ptr(), numbers[3].data_ptr(), lengths.data_ptr(), addresses.data_ptr(),
            cosine.data_ptr(), sine.data_ptr(), None if bias is None else bias.data_ptr(),
            scratch.data_ptr(),
            scratch.data_ptr() + 4 * count * self._heads * self._dim, self._dim**-0.5,
        )  # fmt: skip
        here = ctypes.addressof(forward)
        states = torch.empty(count, self._hidden, dtype=self._dtype)
        mixed = torch.empty(count, self._heads * self._dim, dtype=self._dtype)
        gated = torch.empty(count, self._inner, dtype=self._dtype)
        stream, at, mix = residual.data_ptr(), states.data_ptr(), mixed.data_ptr()
        gates = gated.data_ptr()
        change: Tensor | None = None

        def normalise(weight: Tensor) -> None:
            kernels.normalise(
                count, self._hidden, self._epsilon, threads, stream,
                None if change is None else change.data_ptr(), weight.data_ptr(), at,
            )  # fmt: skip

        for layer, (attention_norm, inner_norm), (qkv, out, gate_up, down) in zip(
            self._layers_of(cache), self._norms, self._products, strict=True
        ):
            normalise(attention_norm)
            made = qkv(states)
            kernels.attend(here, layer, made.data_ptr(), mix)
            change = out(mixed)
            normalise(inner_norm)
            made = gate_up(states)
            kernels.gate(count, self._inner, threads, made.data_ptr(), gates)
            change = down(gated)
        normalise(self._last_norm)
        return self._logits(states if list(wanted) == list(range(count)) else states[list(wanted)])

    def _layers_of(self, cache: KVCache) -> list[int]:
        """Addresses of what the kernels know of each layer; a cache moves when it grows."""
        known, columns, layers = self._layout
        if known() is not cache or columns != cache.columns:
            layers = []
            for number, (keys, values) in enumerate(cache.layers_in_memory()):
                query_weight, key_weight, epsilon = self._head_norms[number]
                layers.append(
                    cpu_kernels.Layer(
                        number,
                        keys.stride(0),
                        keys.stride(1),
                        keys.data_ptr(),
                        values.data_ptr(),
                        None if query_weight is None else query_weight.data_ptr(),
                        None if key_weight is None else key_weight.data_ptr(),
                        epsilon,
                    )
                )
            self._layout = (weakref.ref(cache), cache.columns, layers)
            self._addresses = [ctypes.addressof(layer) for layer in layers]
        return self._addresses


def flat_forward_for(loaded: Loaded) -> FlatForward | None:
    """None where the model, the device or the machine is another: see the head of this module.

    What it computes is compared with the model's ordinary forward once; the engines of one model
    share it.
    """
    if loaded.flat is UNKNOWN:
        loaded.flat = _made(loaded)
    flat: FlatForward | None = loaded.flat
    return flat


def _made(loaded: Loaded) -> FlatForward | None:
    if not _usual(loaded):
        return None
    kernels = cpu_kernels.load(loaded.dtype)
    if kernels is None or not products_work(loaded.dtype):
        return None
    flat = FlatForward(loaded, kernels)
    error = _error(flat, loaded)
    if not error < (0.3 if loaded.dtype == torch.bfloat16 else 1e-3):
        log.warning("the flat forward is wrong for this model by %.2g: it is not used", error)
        return None
    return flat


def _usual(loaded: Loaded) -> bool:
    model, config = loaded.model, loaded.model.config
    return (
        loaded.device.type == "cpu"
        and type(model).__name__ in ARCHITECTURES
        and getattr(config, "hidden_act", "") == "silu"
        and loaded.windows is None
        and loaded.head_dim % 2 == 0
        and loaded.head_dim <= cpu_kernels.LARGEST_HEAD
        and all(parameter.dtype == loaded.dtype for parameter in model.parameters())
        and not any(parameter.requires_grad for parameter in model.parameters())
        and not is_packed(model)
    )


@torch.inference_mode()
def _error(flat: FlatForward, loaded: Loaded) -> float:
    """Distance of a few tokens' logits from the ordinary ones, relative to their size. In bfloat16
    the ordinary ones are the worse (SmolLM2-135M, from float32's: 0.10, the flat ones 0.04).
    """
    ids = [1 + 7 * i % (loaded.vocabulary - 1) for i in range(6)]
    cache = KVCache(
        devices=[torch.device("cpu")] * loaded.layers,
        kv_heads=loaded.kv_heads,
        head_dim=loaded.head_dim,
        rows=1,
        columns=len(ids),
        dtype=loaded.dtype,
    )
    places = list(range(len(ids)))
    mine = flat.run(cache, ids, places, [0] * len(ids), places, [None] * len(ids), places).float()
    with plainly(loaded.model):
        other = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return float((mine - other).norm() / other.norm())
