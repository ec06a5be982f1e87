"""A real checkpoint on real rows: prefixes that begin in four ways, and peft's LoRA beside them."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from chat.engine import adapters
from chat.engine.loading import Loaded, load
from chat.engine.request import AdapterRef
from evaluation.intervals import average
from evaluation.metrics.original import Scorer
from evaluation.predict import engine_for, messages_of, predict, reference_of
from tests.bench.quality.outcomes import Kept, Outcome
from tuning.ptuning.batches import MicroBatch, group_by_length, rows_of_step, token_weights
from tuning.ptuning.encoded import Encoded
from tuning.ptuning.loss import PrefixLoss
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.trainer import Progress, Trainer
from tuning.ptuning.validation import Validation

# Sentences of everyday knowledge, written for this benchmark: what a model says of them has nothing
# to do with the rows.
GENERAL = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "To bake bread you need flour, water, salt and yeast; the dough rises for an hour or two.",
    "In 1969 two people walked on the moon for the first time and came back safely to earth.",
    "北京是中国的首都，故宫在城市的中心，每年有很多人去参观。",
    "水在一百摄氏度时沸腾，在零度时结冰，所以冬天湖面上会有冰。",
    "学习一门外语需要时间，每天读一点、说一点，慢慢就会进步。",
)
TOKENS, OVERHEAD = 2048, 96  # of a forward without gradients
LORA_RATE = 1e-3


def rows_of(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """Rows {"content", "summary"}, one JSON object a line."""
    lines = path.read_text(encoding="utf-8").splitlines()[:most]
    return [
        {"prompt": row["content"], "response": row["summary"], "history": []}
        for row in map(json.loads, lines)
    ]


class Real:
    """One checkpoint, its rows and what is measured on them."""

    def __init__(
        self,
        folder: Path,
        train: Sequence[dict[str, Any]],
        dev: Sequence[dict[str, Any]],
        recipe: Recipe,
        dtype: torch.dtype,
    ):
        self.folder, self.train, self.dev, self.recipe, self.dtype = (
            folder,
            train,
            dev,
            recipe,
            dtype,
        )

    def load(self) -> Loaded:
        return load(self.folder, device="cpu", dtype=self.dtype)

    def what(self, variant: str, recipe: Recipe) -> dict[str, Any]:
        """What an outcome depends on."""
        return {
            "checkpoint": self.folder.name,
            "variant": variant,
            "recipe": recipe.as_dict(),
            "train": len(self.train),
            "dev": len(self.dev),
            "dtype": str(self.dtype),
        }

    def losses(
        self, loaded: Loaded, loss: Callable[..., torch.Tensor], prefix: torch.Tensor
    ) -> tuple[float, float]:
        """(on the dev rows, on the general sentences), nats per token."""
        source, target = self.recipe.max_source_length, self.recipe.max_target_length
        dev = Encoded(self.dev, loaded.prompter, source, target)
        general = [loaded.prompter.plain_ids(text) for text in GENERAL]
        sets = [[dev[row] for row in range(len(dev))], [(ids, list(ids)) for ids in general]]
        found = [
            Validation(
                loss,  # type: ignore[arg-type]
                rows,
                loaded.tokenizer.pad_token_id or 0,
                loaded.device,
                tokens=TOKENS,
                overhead=OVERHEAD,
            )(prefix)
            for rows in sets
        ]
        return found[0], found[1]

    def scores(self, loaded: Loaded, adapter: AdapterRef | None) -> tuple[float, float]:
        """(ROUGE-L, BLEU-4) of greedy answers to the dev rows, in percent."""
        source, target = self.recipe.max_source_length, self.recipe.max_target_length
        engine = engine_for(loaded, source, target, self.recipe.pre_seq_len)
        texts = {
            predicted.row: predicted.text
            for predicted in predict(
                engine,
                ((number, messages_of(row["prompt"])) for number, row in enumerate(self.dev)),
                adapter=adapter,
                max_source_length=source,
                max_target_length=target,
            )
        }
        engine.close()
        scorer = Scorer()
        means = average(
            [
                scorer.score(
                    texts[number],
                    reference_of(loaded.prompter, row["prompt"], row["response"], source, target),
                )
                for number, row in enumerate(self.dev)
            ]
        )
        return means["rouge-l"]["value"], means["bleu-4"]["value"]

    def base(self) -> Outcome:
        loaded = self.load()
        probe = torch.tensor([loaded.prompter.plain_ids(GENERAL[0])])
        empty = torch.zeros(loaded.layers, 2, loaded.kv_heads, 0, loaded.head_dim, dtype=self.dtype)
        dev, general = self.losses(loaded, PrefixLoss(loaded.model, probe), empty)
        return Outcome(*self.scores(loaded, None), dev_loss=dev, general_loss=general)

    def prefix(self, recipe: Recipe) -> Outcome:
        loaded = self.load()

        def report(progress: Progress) -> None:
            print(f"  step {progress.step}: loss {progress.loss:.3f}", flush=True)

        cpu, wall = time.process_time(), time.monotonic()
        prefix = Trainer(loaded, recipe, self.train, None, report).train()
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        probe = torch.tensor([loaded.prompter.plain_ids(GENERAL[0])])
        dev, general = self.losses(loaded, PrefixLoss(loaded.model, probe), prefix.tensor)
        with tempfile.TemporaryDirectory() as folder:
            adapter = AdapterRef(adapters.save(prefix, folder), folder)
            scores = self.scores(loaded, adapter)
        return Outcome(
            *scores, dev_loss=dev, general_loss=general, cpu_seconds=cpu, wall_seconds=wall
        )

    def lora(self) -> Outcome:
        """peft's LoRA, rank 8 on every linear layer, on the same rows in the same order, with the
        same loss.
        """
        recipe, loaded = self.recipe, self.load()
        torch.manual_seed(recipe.seed)
        model = get_peft_model(
            loaded.model,
            LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learnt, lr=LORA_RATE, weight_decay=0.0)
        examples = Encoded(
            self.train, loaded.prompter, recipe.max_source_length, recipe.max_target_length
        )
        pad = loaded.tokenizer.pad_token_id or 0
        probe = torch.tensor([loaded.prompter.plain_ids(GENERAL[0])])
        loss = PrefixLoss(loaded.model, probe)
        empty = torch.zeros(loaded.layers, 2, loaded.kv_heads, 0, loaded.head_dim, dtype=self.dtype)
        cpu, wall = time.process_time(), time.monotonic()
        for step in range(recipe.max_steps):
            numbers = rows_of_step(step, recipe.samples_per_step, len(examples), recipe.seed)
            rows = [examples[number] for number in numbers]
            weights = token_weights(
                [labels for _, labels in rows], recipe.per_device_train_batch_size
            )
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for group in group_by_length([len(ids) for ids, _ in rows], TOKENS, OVERHEAD):
                batch = MicroBatch.of(
                    [rows[row] for row in group],
                    [weights[row] for row in group],
                    pad,
                    loaded.device,
                )
                value = loss(batch, empty, batch.weights)
                value.backward()
                total += value.item()
            torch.nn.utils.clip_grad_norm_(learnt, recipe.max_grad_norm)
            optimizer.step()
            print(f"  step {step + 1}: loss {total:.3f}", flush=True)
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        dev, general = self.losses(loaded, loss, empty)
        return Outcome(dev_loss=dev, general_loss=general, cpu_seconds=cpu, wall_seconds=wall)


def measure(real: Real, variants: dict[str, Recipe], kept: Kept) -> dict[str, Outcome]:
    """The base's outcome, then every variant's, then LoRA's."""
    found = {"base": kept.of(real.what("base", real.recipe), real.base)}
    for name, recipe in variants.items():
        print(f"{name}: {recipe.max_steps} steps", flush=True)
        found[name] = kept.of(real.what(name, recipe), lambda recipe=recipe: real.prefix(recipe))
    lora = replace(real.recipe, learning_rate=LORA_RATE)
    found["lora r8"] = kept.of(real.what("lora", lora), real.lora)
    return found


def keys(found: dict[str, Outcome]) -> dict[str, float]:
    """The figures that are published; those of a variant that was left out are left out."""
    base, random, ours = found["base"], found.get("random"), found.get("prompt+KL")
    result: dict[str, float] = {}
    for name, outcome in found.items():
        short = name.replace("+", "_").replace(" ", "_").lower()
        for key, value in asdict(outcome).items():
            if value and key not in ("kept", "wall_seconds"):
                result[f"gemma_{key}_{short}"] = value
    if ours and random:
        result["gemma_dev_loss_ratio"] = ours.dev_loss / random.dev_loss
        rise = random.general_loss - base.general_loss
        result["gemma_general_rise_ratio"] = (ours.general_loss - base.general_loss) / rise
    if ours and "lora r8" in found:
        result["gemma_vs_lora_dev_loss"] = ours.dev_loss / found["lora r8"].dev_loss
    if ours:
        result["gemma_rouge_l_tuned"] = ours.rouge_l
    result["gemma_rouge_l_base"] = base.rouge_l
    return result
