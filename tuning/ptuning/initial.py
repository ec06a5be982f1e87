"""How a prefix begins: drawn at random as the original does, at zero, or as the keys and values
that the frozen base computes for a text in front of the prompt.

A random start is the worst of the three by peft's own comparison (method_comparison/MetaMathQA), a
text the best: training then begins at what an instruction in the prompt would have done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from chat.chatglm.positions import turn_places
from chat.engine.loading import Loaded
from tuning.ptuning.prefix import PrefixEncoder
from tuning.ptuning.progress import TrainingFailed
from tuning.ptuning.recipe import Recipe


class TextTooLong(ValueError):
    """The instruction alone has more tokens than the prefix has room for."""

    def __init__(self, tokens: int, room: int):
        super().__init__(f"the task text has {tokens} tokens, the prefix has room for {room}")
        self.tokens, self.room = tokens, room


def begin(
    encoder: PrefixEncoder,
    loaded: Loaded,
    recipe: Recipe,
    examples: Sequence[dict[str, Any]],
    before: torch.Tensor | None,
) -> None:
    """The prefix before the first step, as the recipe's `init` says; a new encoder is random
    already. before: the prefix to go on from.
    """
    if recipe.init == "zero":
        torch.nn.init.zeros_(encoder.embedding.weight)
    elif recipe.init == "adapter":
        wanted = encoder().shape
        if before is None or before.shape != wanted:
            found = "none" if before is None else list(before.shape)
            message = f"the prefix to go on from is {found}, this run's is {list(wanted)}"
            raise TrainingFailed("no_adapter_to_go_on_from", message)
        encoder.begin_with(before.float())
    elif recipe.init == "prompt":
        whole = (examples[number] for number in range(len(examples)))
        shown = (row for row in whole if row["prompt"].strip() and row["response"].strip())
        try:
            ids = text_ids(loaded, recipe.init_text, shown, recipe.pre_seq_len)
        except TextTooLong as fault:
            raise TrainingFailed("init_text_too_long", str(fault)) from fault
        encoder.begin_with(keys_and_values(loaded, ids))


def text_ids(
    loaded: Loaded, instruction: str, examples: Iterable[dict[str, str]], pre_seq_len: int
) -> list[int]:
    """`pre_seq_len` token ids: the instruction in the checkpoint's own template, filled up with
    answered examples of the task ({"prompt", "response", ...}).

    Raises TextTooLong when the instruction alone does not fit. Ends in the middle of an example,
    or repeats the text, when the examples do not end where the prefix does.
    """
    ids = loaded.prompter.context_ids(instruction, ())
    if len(ids) > pre_seq_len:
        raise TextTooLong(len(ids), pre_seq_len)
    answered: list[tuple[str, str]] = []
    for example in examples:
        answered.append((example["prompt"], example["response"]))
        ids = loaded.prompter.context_ids(instruction, answered)
        if len(ids) >= pre_seq_len:
            break
    while len(ids) < pre_seq_len:
        ids = ids + ids
    return ids[:pre_seq_len]


@torch.no_grad()
def keys_and_values(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    """[layers, 2, kv_heads, len(ids), head_dim] in float32: what the base's layers compute for a
    text that stands before every prompt and sees nothing but itself.

    Behind this as a prefix, a prompt gets the logits that it gets behind the text. Where a prefix
    shifts positions (peft's rule) the text's own positions are right. ChatGLM's prompt begins at
    place 0 all the same, so the text's keys are turned back by its length: only differences of
    places count in rotary attention. Its second axis, the block, is 0 for text and prompt alike.
    """
    input_ids = torch.tensor([ids], device=loaded.device)
    cache = DynamicCache()
    if loaded.shifts_positions:
        loaded.model.base_model(input_ids=input_ids, past_key_values=cache, use_cache=True)
    else:
        places = torch.arange(len(ids), device=loaded.device)
        loaded.model.base_model(
            input_ids=input_ids,
            position_ids=torch.stack((places, torch.zeros_like(places)))[None],
            attention_mask=torch.zeros(
                1, 1, len(ids), len(ids), dtype=loaded.dtype, device=loaded.device
            ),
            past_key_values=cache,
            use_cache=True,
        )
    layers = []
    for layer in cache.layers:
        keys, values = layer.keys[0].float(), layer.values[0].float()
        if not loaded.shifts_positions:
            keys = turn_places(keys, -len(ids))
        layers.append(torch.stack((keys, values)).cpu())
    return torch.stack(layers)
