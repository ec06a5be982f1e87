"""P-tuning v2: our trainer against the loop that ChatGLM-6B's ptuning/ runs, with the same
mathematics.

    python -m tests.bench.tuning [--quick] [--json]

The reference loop takes one example at a time, padded to 64 + 64 tokens, 16 accumulated, with
gradient checkpointing and logits at every position (docs/chatglm.md#8-training-rows). Both train
a prefix of 128 before the same random model on the same examples, whose lengths are drawn as
ADGEN's are under the official vocabulary (docs/chatglm.md#11-evaluation: prompts of 35 tokens,
responses of 65, half of them cut). One thread; ours and the reference alternate,
CPU-seconds, ratios are medians over rounds. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from chat.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from chat.engine.loading import Loaded, from_parts
from chat.engine.prompts import IGNORED
from tests.bench import report
from tests.support import tiny_training as tiny
from tuning.ptuning.loss import decoder_layers, gradient_checkpointing
from tuning.ptuning.prefix import PrefixEncoder, TrainingPrefixCache
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.trainer import Trainer

SOURCE = TARGET = 64
RECIPE = Recipe(
    pre_seq_len=128,
    max_source_length=SOURCE,
    max_target_length=TARGET,
    lr_scheduler_type="constant",
)
PAD, GMASK, SOP, EOP = 3, 1001, 1004, 1005


def qwen2() -> torch.nn.Module:
    """8 layers of 512, vocabulary 32,000."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 32000,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    more = {"num_key_value_heads": 8, "intermediate_size": 1408, "max_position_embeddings": 1024}
    return Qwen2ForCausalLM(Qwen2Config(**shape, **more)).eval().requires_grad_(False)


def chatglm() -> torch.nn.Module:
    """8 layers of 512 with ChatGLM-6B's vocabulary of 130,528."""
    torch.manual_seed(0)
    shape = {"vocab_size": 130528, "hidden_size": 512, "num_layers": 8, "num_attention_heads": 8}
    ids = {
        "bos_token_id": SOP,
        "eos_token_id": EOP,
        "gmask_token_id": GMASK,
        "mask_token_id": 1000,
        "pad_token_id": PAD,
    }
    config = ChatGLMConfig(**shape, inner_hidden_size=2048, **ids)
    return ChatGLMForConditionalGeneration(config).eval().requires_grad_(False)


def drawn_examples(count: int) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of docs/chatglm.md#8-training-rows: source, controls, target, <eop>."""
    draw, rows = random.Random(0), []
    for _ in range(count):
        source = [
            draw.randrange(10, 1000)
            for _ in range(round(min(SOURCE - 1, max(8, draw.gauss(34.6, 9)))))
        ]
        target = [
            draw.randrange(10, 1000)
            for _ in range(round(min(TARGET - 2, max(10, draw.gauss(64.7, 22)))))
        ]
        ids = [*source, GMASK, SOP, *target, EOP]
        rows.append((ids, [IGNORED] * (len(source) + 1) + ids[len(source) + 1 :]))
    return rows


@dataclass
class Drawn:
    """A prompter that gives the drawn examples out by number."""

    rows: list[tuple[list[int], list[int]]]

    def training_ids(self, messages, response, max_source_length, max_target_length):
        return self.rows[int(messages[-1]["content"])]


def ours(model: torch.nn.Module, rows, steps: int) -> tuple[Trainer, Loaded]:
    loaded = replace(from_parts(model, tiny.tokenizer()), prompter=Drawn(rows))
    examples = [
        {"prompt": str(row), "response": "drawn", "history": []} for row in range(len(rows))
    ]
    return Trainer(loaded, replace(RECIPE, max_steps=steps), examples)


class Reference:
    """Upstream's loop around the model's own forward and loss."""

    def __init__(self, model: torch.nn.Module, encoder: PrefixEncoder, rows):
        self.model, self.encoder, self.rows = model, encoder, rows
        self.layers = decoder_layers(model, encoder.layers)
        self.optimizer = torch.optim.AdamW(
            encoder.parameters(), lr=RECIPE.learning_rate, weight_decay=0.0
        )
        self.dtype = next(model.parameters()).dtype

    def step(self, numbers: list[int]) -> float:
        self.optimizer.zero_grad()
        total = 0.0
        with gradient_checkpointing(self.layers, on=True):
            for number in numbers:
                ids, labels = self.rows[number]
                room = SOURCE + TARGET - len(ids)
                loss = self.model(
                    input_ids=torch.tensor([[*ids, *[PAD] * room]]),
                    labels=torch.tensor([[*labels, *[IGNORED] * room]]),
                    past_key_values=TrainingPrefixCache(self.encoder().to(self.dtype), 1),
                    use_cache=True,
                ).loss
                (loss / len(numbers)).backward()
                total += loss.item() / len(numbers)
        torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), RECIPE.max_grad_norm)
        self.optimizer.step()
        return total


def seconds(call, *arguments) -> float:
    began = time.process_time()
    call(*arguments)
    return time.process_time() - began


class Pair:
    """Ours and the reference on one model, from one prefix, in step with each other."""

    def __init__(
        self, build, dtype: torch.dtype = torch.float32, reference_dtype: torch.dtype | None = None
    ):
        plain = build()
        self.rows = drawn_examples(512)
        self.trainer = ours(copy.deepcopy(plain).to(dtype), self.rows, 10**6)
        encoder = copy.deepcopy(self.trainer.encoder)
        self.reference = Reference(plain.to(reference_dtype or dtype), encoder, self.rows)

    def gradient_error(self) -> float:
        """Relative difference of the gradients of one step from the same prefix, before
        clipping.
        """
        numbers = list(range(16))
        self.trainer._accumulate([self.rows[number] for number in numbers])
        mine = [parameter.grad.clone() for parameter in self.trainer.encoder.parameters()]
        limit, self.reference.encoder = RECIPE.max_grad_norm, copy.deepcopy(self.trainer.encoder)
        untouched = Reference(self.reference.model, self.reference.encoder, self.rows)
        norms = torch.nn.utils.clip_grad_norm_(mine, limit)
        for tensor in mine:
            tensor.mul_(min(1.0, limit / (norms.item() + 1e-6)))
        untouched.step(numbers)
        theirs = [parameter.grad for parameter in untouched.encoder.parameters()]
        apart = sum(((a - b) ** 2).sum() for a, b in zip(mine, theirs, strict=True)).sqrt()
        return (apart / sum((b**2).sum() for b in theirs).sqrt()).item()

    def round(self, steps: int) -> tuple[float, float]:
        """Examples per CPU-second: (ours, the reference's)."""
        mine = theirs = 0.0
        for step in range(steps):
            theirs += seconds(self.reference.step, list(range(16 * step, 16 * step + 16)))
            mine += seconds(self.trainer._update, RECIPE.learning_rate)
            self.trainer.step += 1
        return 16 * steps / mine, 16 * steps / theirs


def peak_mib(who: str) -> float:
    """Peak memory of a process of its own while it takes two steps on the model with the large
    vocabulary (Linux).
    """
    argv = [sys.executable, "-m", "tests.bench.tuning", "--peak-of", who]
    return float(
        subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def own_peak(who: str) -> float:
    rows, model = drawn_examples(64), chatglm()
    trainer = ours(model, rows, 2) if who == "ours" else None
    reference = Reference(
        model, PrefixEncoder(pre_seq_len=128, layers=8, kv_heads=8, head_dim=64), rows
    )
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
    if trainer is not None:
        trainer.train()
    else:
        for step in range(2):
            reference.step(list(range(16 * step, 16 * step + 16)))
    return report.peak_mib()


PAIRS = {
    "fp32": (qwen2, torch.float32, torch.float32),
    "bf16": (qwen2, torch.bfloat16, torch.float32),
    "bf16_both": (qwen2, torch.bfloat16, torch.bfloat16),
    "vocab130k": (chatglm, torch.float32, torch.float32),
}


def measure(rounds: int, steps: int, say) -> dict[str, float]:
    results: dict[str, float] = {}
    for name, (build, dtype, reference_dtype) in PAIRS.items():
        pair = Pair(build, dtype, reference_dtype)
        if name == "fp32":
            results["fp32_grad_rel_error"] = pair.gradient_error()
            say(f"relative difference of the gradients, fp32: {results['fp32_grad_rel_error']:.1e}")
        speeds = [pair.round(steps) for _ in range(rounds)]
        ratios = [mine / theirs for mine, theirs in speeds]
        results[f"{name}_vs_upstream"] = statistics.median(ratios)
        results[f"{name}_samples_per_cpu_s"] = statistics.median(mine for mine, _ in speeds)
        results[f"{name}_upstream_samples_per_cpu_s"] = statistics.median(
            theirs for _, theirs in speeds
        )
        say(
            f"{name:10s} ours {results[f'{name}_samples_per_cpu_s']:6.2f}  reference "
            f"{results[f'{name}_upstream_samples_per_cpu_s']:6.2f} examples/CPU-s  "
            f"ratio {results[f'{name}_vs_upstream']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    mine, theirs = peak_mib("ours"), peak_mib("reference")
    results |= {
        "peak_mib": mine,
        "peak_mib_upstream": theirs,
        "peak_mib_vs_upstream": mine / theirs,
    }
    say(f"peak memory, vocabulary 130,528: ours {mine:.0f} MiB, reference {theirs:.0f} MiB")
    return results


def main() -> None:
    parser = report.arguments(__doc__, "one round of one step")
    parser.add_argument("--peak-of", choices=["ours", "reference"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak_of:
        print(own_peak(arguments.peak_of))
        return
    rounds, steps = (1, 1) if arguments.quick else (3, 1)
    results = measure(rounds, steps, lambda line: print(line, flush=True))
    packages = ("torch", "transformers")
    report.tell(
        "tuning", results, rounds=rounds, packages=packages, as_json=arguments.json, threads=1
    )


if __name__ == "__main__":
    main()
