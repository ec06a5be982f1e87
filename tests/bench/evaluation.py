"""Evaluation: many rows at once against one after another, the metrics, and how often a difference
is seen where there is none.

    python -m tests.bench.evaluation [--quick] [--json]

The starter model, greedy, on the sample's held-out rows. `rows_vs_batch1`: rows per CPU-second of
evaluation.predict over those of transformers' generate with one row at a time, as upstream's
evaluation runs; both alternate on the same weights. `paired_false_alarm_rate`: the share of 95 %
intervals of a paired difference that leave 0 out, when each row's difference has a random sign (5 %
is what they promise).
"""

import os
import random
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers

from chat.engine.loading import load
from chat.starter import sample
from chat.starter.build import FOLDER
from evaluation.intervals import METRICS, average, difference
from evaluation.metrics.original import Scorer
from evaluation.predict import engine_for, messages_of, predict
from tests.bench import report

SOURCE = TARGET = 128  # tokens, the starter's preset
PAIRS = 1070  # rows of ADGEN's dev file


def one_by_one(model, prompter, rows) -> dict[int, str]:
    texts = {}
    for row, messages in rows:
        ids = prompter.prompt_ids(messages, SOURCE)
        with torch.inference_mode():
            made = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=TARGET,
                do_sample=False,
                eos_token_id=list(prompter.end_ids),
                pad_token_id=min(prompter.end_ids),
            )
        texts[row] = prompter.decode(made[0, len(ids) :].tolist())
    return texts


def together(loaded, rows) -> dict[int, str]:
    engine = engine_for(loaded, SOURCE, TARGET)
    return {
        found.row: found.text
        for found in predict(engine, rows, max_source_length=SOURCE, max_target_length=TARGET)
    }


def timed(work, *arguments):
    started = time.process_time()
    result = work(*arguments)
    return result, time.process_time() - started


def pairs(count: int) -> list[tuple[str, str]]:
    """Texts of the sample's style against each other: some words in common, as a tuned model's
    predictions have.
    """
    draw = random.Random(0)
    texts = [row["summary"] for row in sample.load(sample.TRAIN)]
    return [(draw.choice(texts), draw.choice(texts)) for _ in range(count)]


def false_alarm_rate(experiments: int, rows: int = 100) -> float:
    draw = np.random.default_rng(0)
    scorer = Scorer()
    gaps = [
        scorer.score(*pair)["rouge-l"] - scorer.score(*other)["rouge-l"]
        for pair, other in zip(pairs(rows), pairs(2 * rows)[rows:], strict=True)
    ]
    zero = [dict.fromkeys(METRICS, 0.0)] * rows
    alarms = 0
    for seed in range(experiments):
        signs = draw.choice([-1, 1], rows)
        null = [dict.fromkeys(METRICS, gap * sign) for gap, sign in zip(gaps, signs, strict=True)]
        found = difference(null, zero, seed=seed)["rouge-l"]
        alarms += not found["low"] <= 0 <= found["high"]
    return alarms / experiments


def main() -> None:
    options = report.arguments(__doc__, "fewer rows, rounds and experiments").parse_args()
    torch.set_num_threads(1)
    rounds = 2 if options.quick else 5
    loaded = load(FOLDER, device="cpu")
    plain = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    held_out = sample.load(sample.DEV)[: 32 if options.quick else 100]
    rows = [(row, messages_of(example["content"])) for row, example in enumerate(held_out)]
    ratios, speeds, same = [], [], []
    for _ in range(rounds):
        ours, our_seconds = timed(together, loaded, rows)
        theirs, their_seconds = timed(one_by_one, plain, loaded.prompter, rows)
        ratios.append(their_seconds / our_seconds)
        speeds.append(len(rows) / our_seconds)
        same.append(sum(ours[row] == theirs[row] for row in theirs) / len(rows))
    scorer = Scorer()
    scorer.cut("加载词典")
    scored, score_seconds = [], []
    for _ in range(rounds):
        scored, seconds = timed(lambda: [scorer.score(*pair) for pair in pairs(PAIRS)])
        score_seconds.append(seconds + timed(average, scored)[1])
    results = {
        "rows_vs_batch1": statistics.median(ratios),
        "rows_vs_batch1_lowest": min(ratios),
        "rows_vs_batch1_highest": max(ratios),
        "rows_per_cpu_s": statistics.median(speeds),
        "identical_rows_fraction": min(same),
        "metrics_1070_seconds": statistics.median(score_seconds),
        "paired_false_alarm_rate": false_alarm_rate(200 if options.quick else 1000),
    }
    packages = ("torch", "transformers")
    report.tell(
        "evaluation", results, rounds=rounds, packages=packages, as_json=options.json, threads=1
    )


if __name__ == "__main__":
    main()
