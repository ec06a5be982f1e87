"""Is what will be served what was trained? Prompts answered through the serving path, from the
adapter's files, and held against the logits of the trainer's own forward.

Both decode greedily, so the same tokens come out where the trainer's best token is the served one
at every place; one forward over a whole answer tells that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import Loaded
from chat.engine.request import AdapterRef, Request, SamplingParams
from tuning.ptuning.prefix import TrainingPrefixCache

PROMPTS, NEW_TOKENS = 8, 32
# By how much the trainer's best token may beat the served one, in logits: what rounding does when
# two words are as likely as each other.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


@dataclass(frozen=True)
class Proof:
    """gap: the most by which the trainer's best token beats the one that was served, in logits.
    same: prompts answered with exactly the trainer's tokens.
    """

    prompts: int
    tokens: int
    same: int
    gap: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.gap <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def prove(
    loaded: Loaded,
    prefix: torch.Tensor,
    served: AdapterRef | None,
    prompts: Sequence[list[int]],
    trained: Any = None,
) -> Proof:
    """prefix: the trainer's, [layers, 2, kv_heads, pre_seq_len, head_dim] in the model's dtype;
    served: the same as files; prompts: token ids. trained: the trainer's model, where weights were
    trained; then `loaded` is what was read from its files, and the prefix has no positions.
    """
    judge = loaded.model if trained is None else trained
    longest = max(map(len, prompts)) + NEW_TOKENS
    config = EngineConfig(
        max_rows=len(prompts), max_length=longest, prefix_room=prefix.shape[3], reuse_prompts=False
    )
    engine = Engine(loaded, config)
    try:
        answers = engine.generate(
            Request(
                str(number),
                prompt_ids=tuple(ids),
                adapter=served,
                sampling=SamplingParams(do_sample=False, max_new_tokens=NEW_TOKENS),
            )
            for number, ids in enumerate(prompts)
        )
    finally:
        engine.close()
    gaps = []
    for ids, answer in zip(prompts, answers, strict=True):
        said = list(answer.token_ids)
        gaps.append(_gap(judge, prefix, ids, said) if answer.error is None else float("inf"))
    return Proof(
        prompts=len(prompts),
        tokens=sum(len(answer.token_ids) for answer in answers),
        same=sum(gap == 0 for gap in gaps),
        gap=max(gaps),
        tolerance=TOLERANCE[loaded.dtype],
    )


@torch.no_grad()
def _gap(model: Any, prefix: torch.Tensor, prompt: list[int], said: list[int]) -> float:
    device = model.get_input_embeddings().weight.device
    logits = model(
        input_ids=torch.tensor([[*prompt, *said[:-1]]], device=device),
        past_key_values=TrainingPrefixCache(prefix.to(device), 1),
        use_cache=True,
    ).logits[0, len(prompt) - 1 :]
    best, chosen = logits.float().max(-1).values, torch.tensor(said, device=logits.device)
    gap = (best - logits.float().gather(-1, chosen[:, None])[:, 0]).max().item()
    return gap if gap == gap else float("inf")  # not-a-number is no agreement
