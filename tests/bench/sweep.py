"""How much a sweep saves: `python -m tests.bench.sweep [--json]`.

CPU-seconds a step of one thread, prefixes of the starter one after the other and as rows of one
batch, after a step that warms up.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from functools import partial

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")
django.setup()

import torch  # noqa: E402

from chat.engine.loading import load  # noqa: E402
from chat.registry import STARTER_FOLDER  # noqa: E402
from tuning.plan import PRESETS  # noqa: E402
from tuning.ptuning.sweep import Sweep  # noqa: E402
from tuning.ptuning.trainer import Trainer  # noqa: E402

SAMPLE = STARTER_FOLDER.parent / "sample" / "train.json"


def measure(dtype: torch.dtype, batch: int, prefixes: int, steps: int) -> dict:
    loaded = load(STARTER_FOLDER, device="cpu", dtype=dtype)
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()[:400]
    rows = [
        {"prompt": row["content"], "response": row["summary"], "history": []}
        for row in map(json.loads, lines)
    ]
    changes = {"max_steps": steps, "per_device_train_batch_size": batch}
    recipe = replace(PRESETS["starter"], **changes, kl_weight=0.0, eval_steps=0)
    makers = [
        partial(Trainer, loaded, replace(recipe, seed=seed), rows) for seed in range(prefixes)
    ]
    makers[0]().train()
    trainers = [make() for make in makers]
    began = time.process_time()
    for trainer in trainers:
        trainer.train()
    alone = (time.process_time() - began) / steps
    sweep = Sweep(makers)
    began = time.process_time()
    sweep.train()
    joint = (time.process_time() - began) / steps
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "examples_a_step": batch,
        "prefixes": prefixes,
        "alone_cpu_seconds": round(alone, 4),
        "joint_cpu_seconds": round(joint, 4),
        "ratio": round(alone / joint, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefixes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [
        measure(dtype, batch, options.prefixes, options.steps)
        for dtype in (torch.float32, torch.bfloat16)
        for batch in options.batches
    ]
    for one in found:
        print(json.dumps(one) if options.json else "  ".join(f"{k} {v}" for k, v in one.items()))


if __name__ == "__main__":
    main()
