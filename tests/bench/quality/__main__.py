"""What a prefix is worth: how much of the task it learns, how much of the rest it forgets.

    python -m tests.bench.quality [--quick] [--json] [--seeds 42,43,44] [--variants NAMES]
        [--checkpoint FOLDER --train FILE --dev FILE] [--steps N] [--dev-rows N] [--keep FOLDER]

Four ways to tune: `random` (drawn from N(0, 1), as upstream), `zero`, `prompt` (a text's keys and
values) and `prompt+KL` (held to the base's own answers besides); `shipped` is the preset that the
portal offers for the starter, `random` on the starter what that was before there was a choice.

The starter, on the sample's 1,000 rows, scored greedily on its 100 held-out rows. Kept is the share
of its small talk that still gets exactly its answer, asked in a way that is not among the general
prompts that hold the prefix. With --checkpoint also a real model on real rows {"content",
"summary"}: loss on held-out rows, loss on sentences that have nothing to do with them, scores, and
peft's LoRA of rank 8 beside it, on the same rows in the same order. --keep makes a long measurement
go on where it was stopped. One thread; CPU-seconds are of the training alone.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers

from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import Loaded, load
from chat.engine.request import AdapterRef, Request, SamplingParams
from chat.starter import sample
from chat.starter.build import FOLDER
from chat.starter.small_talk import INTENTS
from tests.bench import report, starter
from tests.bench.quality import real
from tests.bench.quality.outcomes import Kept, Outcome, table
from tuning.ptuning.general_prompts import GENERAL_PROMPTS
from tuning.ptuning.recipe import Recipe

# What the preset was before prefixes could begin otherwise: the measure of "today's gain".
PLAIN = {"init": "random", "init_text": "", "freeze_first": False, "kl_weight": 0.0}
EARLIER = {**PLAIN, "pre_seq_len": 64, "learning_rate": 5e-2, "max_steps": 500}
STARTER_TEXT = "任务：根据 content 写出 summary，内容、风格和长短都与例子一致。"
ROWS_TEXT = "根据商品的属性写一段广告文案，语气亲切自然。"
REAL = Recipe(
    pre_seq_len=64,
    learning_rate=2e-2,
    lr_scheduler_type="constant",
    max_steps=24,
    per_device_train_batch_size=16,
    gradient_accumulation_steps=1,
)


def _bare(text: str) -> str:
    return re.sub(r"\W", "", text).lower()


def small_talk() -> list[tuple[str, str]]:
    """(question, answer) of every intent of the starter, asked in a way that is not trained on."""
    trained = {_bare(prompt) for prompt in GENERAL_PROMPTS}
    fresh = (
        ([form for form in forms if _bare(form) not in trained], answer)
        for forms, answer in INTENTS
    )
    return [(forms[0], answer) for forms, answer in fresh if forms]


def talk_kept(loaded: Loaded, adapter: AdapterRef | None) -> float:
    """Share of `small_talk` that gets exactly its answer, in percent."""
    asked = small_talk()
    engine = Engine(loaded, EngineConfig(max_rows=16, max_length=256))
    answers = engine.generate(
        Request(
            str(number),
            ({"role": "user", "content": question},),
            adapter=adapter,
            sampling=SamplingParams(do_sample=False, max_new_tokens=128),
        )
        for number, (question, _) in enumerate(asked)
    )
    engine.close()
    right = sum(
        answer.text.strip() == expected
        for answer, (_, expected) in zip(answers, asked, strict=True)
    )
    return 100 * right / len(asked)


def starter_variants() -> dict[str, Recipe]:
    shipped = starter.shipped_recipe()
    earlier = replace(shipped, **EARLIER)
    return {
        "random": earlier,
        "zero": replace(earlier, init="zero"),
        "prompt": replace(
            earlier, init="prompt", init_text=STARTER_TEXT, freeze_first=True, learning_rate=3e-2
        ),
        "prompt+KL": replace(shipped, init="prompt", init_text=STARTER_TEXT, freeze_first=True),
        "shipped": shipped,
    }


def real_variants(steps: int) -> dict[str, Recipe]:
    from tuning.plan import PRESETS

    random = replace(REAL, max_steps=steps)
    ours = PRESETS["general"]
    prompt = replace(
        random,
        init="prompt",
        init_text=ROWS_TEXT,
        freeze_first=ours.freeze_first,
        learning_rate=ours.learning_rate,
    )
    return {
        "random": random,
        "zero": replace(random, init="zero", learning_rate=ours.learning_rate),
        "prompt": prompt,
        "prompt+KL": replace(prompt, kl_weight=ours.kl_weight, kl_share=ours.kl_share),
    }


def measure_starter(
    variants: dict[str, Recipe], seeds: Sequence[int], rows: int, kept: Kept
) -> tuple[Outcome, dict[str, list[Outcome]]]:
    """The base's outcome, measured once, and each variant's, one per seed."""
    loaded = load(FOLDER, device="cpu")
    recipe = starter.shipped_recipe()

    def base() -> Outcome:
        rouge, bleu = starter.scores(loaded, recipe, None, rows)
        return Outcome(rouge, bleu, kept=talk_kept(loaded, None))

    def tuned(recipe: Recipe) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            adapter, cpu, wall = starter.tune(loaded, recipe, Path(folder) / "adapter")
            rouge, bleu = starter.scores(loaded, recipe, adapter, rows)
            return Outcome(
                rouge, bleu, kept=talk_kept(loaded, adapter), cpu_seconds=cpu, wall_seconds=wall
            )

    what = {"checkpoint": "starter", "rows": rows, "general": len(GENERAL_PROMPTS)}
    found: dict[str, list[Outcome]] = {}
    for name, one in variants.items():
        for seed in seeds:
            print(f"starter, {name}, seed {seed}", flush=True)
            recipe = replace(one, seed=seed)
            found.setdefault(name, []).append(
                kept.of({**what, "recipe": recipe.as_dict()}, lambda recipe=recipe: tuned(recipe))
            )
            table(name, {f"seed {seed}": found[name][-1]})
    return kept.of({**what, "variant": "base"}, base), found


def starter_keys(base: Outcome, found: dict[str, list[Outcome]]) -> dict[str, float]:
    result: dict[str, float] = {
        "starter_rouge_l_base": base.rouge_l,
        "starter_small_talk_base": base.kept,
    }
    for name, outcomes in found.items():
        short = name.replace("+", "_").lower()
        result |= {
            f"starter_rouge_l_{short}_min": min(one.rouge_l for one in outcomes),
            f"starter_bleu_4_{short}_min": min(one.bleu_4 for one in outcomes),
            f"starter_kept_{short}_min": min(one.kept for one in outcomes),
            f"starter_cpu_seconds_{short}_max": max(one.cpu_seconds for one in outcomes),
        }
    ours, earlier = found.get("shipped"), found.get("random")
    if ours:
        result["starter_small_talk_kept_min"] = min(one.kept for one in ours) / base.kept
        result["starter_rouge_l_gain_min"] = min(one.rouge_l for one in ours) / base.rouge_l
    if ours and earlier:
        result["starter_gain_ratio"] = (_mean(ours) - base.rouge_l) / (
            _mean(earlier) - base.rouge_l
        )
    return result


def _mean(outcomes: Sequence[Outcome]) -> float:
    return sum(outcome.rouge_l for outcome in outcomes) / len(outcomes)


def main() -> None:
    parser = report.arguments(__doc__, "one seed, few steps and rows: a minute")
    parser.add_argument("--seeds", default="42,43,44", help="of the starter; comma-separated")
    parser.add_argument("--variants", help="comma-separated; default: all")
    parser.add_argument("--checkpoint", type=Path, help="folder of a real model")
    parser.add_argument("--train", type=Path, help="its rows to learn")
    parser.add_argument("--dev", type=Path, help="its rows to be judged by")
    parser.add_argument("--only", choices=("starter", "real"), help="one half alone")
    parser.add_argument("--steps", type=int, default=24, help="of 16 rows, on the real model")
    parser.add_argument("--dev-rows", type=int, default=40, help="of the real rows")
    parser.add_argument("--bfloat16", action="store_true", help="the real model's weights")
    parser.add_argument("--keep", type=Path, help="folder that keeps what has been measured")
    arguments = parser.parse_args()
    if arguments.checkpoint and not (arguments.train and arguments.dev):
        parser.error("--checkpoint needs --train and --dev")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    kept = Kept(arguments.keep)
    results: dict[str, float] = {}
    began = time.monotonic()

    def wanted(variants: dict[str, Recipe]) -> dict[str, Recipe]:
        names = arguments.variants.split(",") if arguments.variants else list(variants)
        return {name: variants[name] for name in names if name in variants}

    seeds = [int(seed) for seed in arguments.seeds.split(",")][: 1 if arguments.quick else None]
    if arguments.only != "real":
        variants = wanted(starter_variants())
        if arguments.quick:
            variants = {
                name: replace(recipe, max_steps=starter.QUICK_STEPS // 4, save_steps=30)
                for name, recipe in variants.items()
            }
        rows = starter.QUICK_ROWS if arguments.quick else sample.DEV_ROWS
        base, found = measure_starter(variants, seeds, rows, kept)
        results |= starter_keys(base, found)
        table("starter: base", {"": base})
        for name, outcomes in found.items():
            table(name, {f"seed {seed}": one for seed, one in zip(seeds, outcomes, strict=True)})
    if arguments.only != "starter" and arguments.checkpoint:
        starter.shipped_recipe()  # sets Django up, whose presets are asked
        steps = 2 if arguments.quick else arguments.steps
        model = real.Real(
            arguments.checkpoint,
            real.rows_of(arguments.train),
            real.rows_of(arguments.dev, 8 if arguments.quick else arguments.dev_rows),
            replace(REAL, max_steps=steps),
            torch.bfloat16 if arguments.bfloat16 else torch.float32,
        )
        outcomes = real.measure(model, wanted(real_variants(steps)), kept)
        table(arguments.checkpoint.name, outcomes)
        results |= real.keys(outcomes)
    print(f"{time.monotonic() - began:.0f} s")
    report.tell(
        "quality",
        results,
        rounds=len(seeds),
        packages=("torch", "transformers", "peft"),
        as_json=arguments.json,
        threads=1,
    )


if __name__ == "__main__":
    main()
