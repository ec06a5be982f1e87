"""What P-tuning v2 does to the starter model on the sample dataset, with the shipped settings.

    python -m tests.bench.starter [--quick] [--json] [--seeds 42,43,44]
        [--learning-rate R] [--steps N] [--pre-seq-len N]

The real trainer on the sample's 1,000 rows, the real evaluation (greedy) on its 100 held-out rows,
once for the bare model and once per seed. Small talk is the share of the starter's own intents that
still get their exact answer, with the prefix off and on. CPU-seconds are of the training alone
(encoding included), loading and evaluation apart.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import django
import torch
import transformers

from chat.engine import adapters
from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import Loaded, load
from chat.engine.request import AdapterRef, Request, SamplingParams
from chat.starter import sample
from chat.starter.build import FOLDER
from chat.starter.small_talk import INTENTS
from evaluation.intervals import average
from evaluation.metrics.original import Scorer
from evaluation.predict import engine_for, messages_of, predict, reference_of
from tests.bench import report
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.trainer import Progress, Trainer

QUICK_ROWS, QUICK_STEPS = 30, 120


@dataclass(frozen=True)
class Outcome:
    """Means in percent over the held-out rows, and the share of small talk answered exactly, in
    percent.
    """

    rouge_l: float
    bleu_4: float
    small_talk: float
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0


def shipped_recipe() -> Recipe:
    """The preset that a tuning run on the starter model starts from."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")
    django.setup()
    from tuning.plan import PRESETS

    return PRESETS["starter"]


def tune(loaded: Loaded, recipe: Recipe, folder: Path) -> tuple[AdapterRef, float, float]:
    """(the adapter, CPU-seconds, wall seconds) of one run on the sample."""
    examples = [
        {"prompt": row["content"], "response": row["summary"], "history": []}
        for row in sample.load(sample.TRAIN)
    ]

    def report(progress: Progress) -> None:
        if progress.step % 100 == 0:
            print(
                f"  seed {recipe.seed}, step {progress.step}: loss {progress.loss:.3f}", flush=True
            )

    cpu, wall = time.process_time(), time.monotonic()
    prefix = Trainer(loaded, recipe, examples, None, report).train()
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    return AdapterRef(adapters.save(prefix, folder), str(folder)), cpu, wall


def scores(
    loaded: Loaded, recipe: Recipe, adapter: AdapterRef | None, rows: int
) -> tuple[float, float]:
    """(ROUGE-L, BLEU-4) in percent on the first `rows` held-out rows, counted as the portal's
    evaluation counts.
    """
    held_out = sample.load(sample.DEV)[:rows]
    source, target = recipe.max_source_length, recipe.max_target_length
    engine = engine_for(loaded, source, target, recipe.pre_seq_len)
    asked = ((number, messages_of(row["content"])) for number, row in enumerate(held_out))
    texts = {
        predicted.row: predicted.text
        for predicted in predict(
            engine, asked, adapter=adapter, max_source_length=source, max_target_length=target
        )
    }
    engine.close()
    scorer = Scorer()
    means = average(
        [
            scorer.score(
                texts[number],
                reference_of(loaded.prompter, row["content"], row["summary"], source, target),
            )
            for number, row in enumerate(held_out)
        ]
    )
    return means["rouge-l"]["value"], means["bleu-4"]["value"]


def small_talk(loaded: Loaded, adapter: AdapterRef | None) -> float:
    """Share of the intents, asked in their first form, that get exactly their answer, in
    percent.
    """
    greedy = SamplingParams(do_sample=False, max_new_tokens=128)
    engine = Engine(loaded, EngineConfig(max_rows=16, max_length=256))
    answers = engine.generate(
        Request(
            str(number), ({"role": "user", "content": asked[0]},), adapter=adapter, sampling=greedy
        )
        for number, (asked, _) in enumerate(INTENTS)
    )
    engine.close()
    right = sum(
        answer.text.strip() == expected
        for answer, (_, expected) in zip(answers, INTENTS, strict=True)
    )
    return 100 * right / len(INTENTS)


def measure(recipe: Recipe, seeds: list[int], rows: int) -> tuple[Outcome, list[Outcome]]:
    """The bare model's outcome, and one outcome per seed."""
    loaded = load(FOLDER, device="cpu")
    base = Outcome(*scores(loaded, recipe, None, rows), small_talk(loaded, None))
    tuned = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            adapter, cpu, wall = tune(loaded, replace(recipe, seed=seed), Path(folder) / str(seed))
            tuned.append(
                Outcome(
                    *scores(loaded, recipe, adapter, rows), small_talk(loaded, adapter), cpu, wall
                )
            )
    return base, tuned


def main() -> None:
    parser = report.arguments(
        __doc__, f"one seed, {QUICK_STEPS} steps, {QUICK_ROWS} rows: a minute"
    )
    parser.add_argument("--seeds", default="42,43,44", help="comma-separated")
    parser.add_argument("--learning-rate", type=float, help="instead of the shipped one")
    parser.add_argument("--steps", type=int, help="instead of the shipped number")
    parser.add_argument("--pre-seq-len", type=int, help="instead of the shipped length")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    changes = {
        "learning_rate": arguments.learning_rate,
        "max_steps": arguments.steps or (QUICK_STEPS if arguments.quick else None),
        "pre_seq_len": arguments.pre_seq_len,
    }
    recipe = replace(
        shipped_recipe(), **{name: value for name, value in changes.items() if value is not None}
    )
    seeds = [int(seed) for seed in arguments.seeds.split(",")][: 1 if arguments.quick else None]
    base, tuned = measure(recipe, seeds, QUICK_ROWS if arguments.quick else sample.DEV_ROWS)

    print(f"{'':10} {'ROUGE-L':>8} {'BLEU-4':>8} {'small talk %':>13} {'CPU-s':>7} {'wall s':>7}")
    for name, outcome in [
        ("base", base),
        *((f"seed {seed}", one) for seed, one in zip(seeds, tuned, strict=True)),
    ]:
        print(
            f"{name:10} {outcome.rouge_l:8.2f} {outcome.bleu_4:8.2f} {outcome.small_talk:13.1f} "
            f"{outcome.cpu_seconds:7.1f} {outcome.wall_seconds:7.1f}"
        )
    results = {
        "rouge_l_gain_min": min(one.rouge_l for one in tuned) / base.rouge_l,
        "bleu_4_gain_min": min(one.bleu_4 for one in tuned) / base.bleu_4,
        "tune_cpu_seconds_max": max(one.cpu_seconds for one in tuned),
        "tune_wall_seconds_max": max(one.wall_seconds for one in tuned),
        "rouge_l_base": base.rouge_l,
        "rouge_l_tuned_min": min(one.rouge_l for one in tuned),
        "bleu_4_base": base.bleu_4,
        "bleu_4_tuned_min": min(one.bleu_4 for one in tuned),
        "small_talk_prefix_off": base.small_talk,
        "small_talk_prefix_on_min": min(one.small_talk for one in tuned),
    }
    packages = ("torch", "transformers")
    report.tell(
        "starter", results, rounds=len(seeds), packages=packages, as_json=arguments.json, threads=1
    )


if __name__ == "__main__":
    main()
