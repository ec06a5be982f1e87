"""Guessed tokens (chat/engine/drafts.py) against none: what they gain where a text repeats itself,
and what they cost where it does not.

    python -m tests.bench.drafts [--quick] [--json]

`copy_r1` to `copy_r4` and `free_r1` to `free_r4`: SmolLM2-135M-Instruct, that many requests at
once, asked to say a given text again and asked for a text of its own. `near`: an evaluation of 96
rows (quick: 12, which begin together, before the engine has learnt what comes true) behind a prefix
that is the keys and values of an instruction, the bare model's predictions as guesses; `far`: of
the starter model tuned on its sample, whose answers have nothing in common with the bare model's;
`again`: the tuned one's own predictions as guesses, the most that can be gained.
float32, greedy, one thread, alternating. `_vs_plain`: CPU-seconds without guesses over those with.
`_tokens_per_step`: of a row, 1 without guesses. `_identical`: the share of equal answers.

Needs the model's folder (`python -m tests.vllm.environment`, or VLLM_MODEL).
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers

from chat.engine.adapters import KVPrefix, save
from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import Loaded, load
from chat.engine.request import AdapterRef, Request, SamplingParams
from chat.starter import sample
from chat.starter.build import FOLDER
from evaluation.predict import NOTHING, Messages, engine_for, messages_of, predict
from tests.bench import report
from tests.bench.starter import shipped_recipe, tune
from tests.bench.vllm import WORDS
from tests.vllm import environment

ROWS = (1, 2, 4)
TOPICS = ("a lighthouse", "the sea", "bread", "winter", "a train", "old maps", "bees", "the moon")
INSTRUCTION = "You answer in two or three short sentences, politely, and never use lists."
SOURCE = 96  # tokens of an evaluated prompt


def copied(draw: random.Random) -> str:
    """Sentences that no model knows by heart."""
    sentences = [" ".join(draw.choices(WORDS, k=9)).capitalize() + "." for _ in range(5)]
    return "Repeat this text exactly, word for word:\n\n" + " ".join(sentences)


def free(draw: random.Random) -> str:
    return f"Tell me a short story about {draw.choice(TOPICS)} and {draw.choice(TOPICS)}."


def chat(
    loaded: Loaded, prompts: list[str], rows: int, tokens: int, drafts: bool
) -> tuple[float, float, list[tuple[int, ...]]]:
    """CPU-seconds, tokens of a row in a step, the answers."""
    sampling = SamplingParams(do_sample=False, max_new_tokens=tokens)
    engine = Engine(loaded, EngineConfig(max_rows=rows, max_length=512, drafts=drafts))
    began = time.process_time()
    answers = engine.generate(
        Request(str(n), ({"role": "user", "content": text},), sampling=sampling)
        for n, text in enumerate(prompts)
    )
    spent, steps = time.process_time() - began, engine.status()["steps"]
    engine.close()
    ids = [answer.token_ids for answer in answers]
    return spent, sum(map(len, ids)) / (steps * rows), ids


def evaluate(
    loaded: Loaded,
    rows: list[Messages],
    tokens: int,
    adapter: AdapterRef | None,
    length: int,
    resembles: Mapping[int, str] = NOTHING,
) -> tuple[float, dict[int, str]]:
    """CPU-seconds, the predictions."""
    engine = engine_for(loaded, SOURCE, tokens, length)
    began = time.process_time()
    found = predict(
        engine, enumerate(rows), adapter=adapter, max_source_length=SOURCE,
        max_target_length=tokens, resembles=resembles,
    )  # fmt: skip
    texts = {predicted.row: predicted.text for predicted in found}
    spent = time.process_time() - began
    engine.close()
    return spent, texts


def instructed(loaded: Loaded, folder: Path) -> tuple[AdapterRef, int]:
    """A prefix that is a text's keys and values, as a run's `init` makes one; its length."""
    ids = loaded.tokenizer.encode(f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n")
    with torch.no_grad():
        cache = loaded.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    name = save(KVPrefix(torch.stack(layers), True, loaded.fingerprint), folder)
    return AdapterRef(name, str(folder)), len(ids)


def main() -> None:
    arguments = report.arguments(__doc__, "fewer rows and tokens, one round").parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if not (environment.model() / "config.json").is_file():
        raise SystemExit(environment.missing())
    quick = arguments.quick
    tokens, rounds, count = (48, 1, 12) if quick else (96, 3, 96)
    samples: dict[str, list[float]] = {}

    def add(key: str, value: float) -> None:
        samples.setdefault(key, []).append(value)
        print(f"  {key} {value:.4g}", flush=True)

    small = load(environment.model(), device="cpu", dtype=torch.float32)
    starter = load(FOLDER, device="cpu")
    draw = random.Random(1)
    with tempfile.TemporaryDirectory(prefix="bench-drafts-") as place:
        recipe = shipped_recipe()
        recipe = replace(recipe, max_steps=60) if quick else recipe
        tuned, _cpu, _wall = tune(starter, recipe, Path(place) / "tuned")
        shown = [messages_of(row["content"]) for row in sample.load(sample.DEV)[:count]]
        asked: list[Messages] = [({"role": "user", "content": free(draw)},) for _ in range(count)]
        near, length = instructed(small, Path(place) / "near")
        evaluations = {
            "near": (small, asked, tokens, near, length),
            "far": (starter, shown, 128, tuned, recipe.pre_seq_len),
        }
        bases = {
            name: evaluate(loaded, rows, most, None, 0)[1]
            for name, (loaded, rows, most, _, _) in evaluations.items()
        }
        chat(small, [free(draw)], 1, 4, True)
        for _ in range(rounds):
            for kind, asks in (("copy", copied), ("free", free)):
                for rows in ROWS:
                    prompts = [asks(draw) for _ in range(rows if quick else 2 * rows)]
                    plain, _steps, expected = chat(small, prompts, rows, tokens, False)
                    guessed, per_step, found = chat(small, prompts, rows, tokens, True)
                    add(f"{kind}_r{rows}_vs_plain", plain / guessed)
                    add(f"{kind}_r{rows}_tokens_per_step", per_step)
                    same = sum(a == b for a, b in zip(expected, found, strict=True))
                    add(f"{kind}_r{rows}_identical", same / len(found))
            for name, settings in evaluations.items():
                plain, texts = evaluate(*settings)
                for label, guesses in ((name, bases[name]), (f"{name}_again", texts)):
                    guessed, other = evaluate(*settings, guesses)
                    add(f"{label}_vs_plain", plain / guessed)
                    same = sum(texts[row] == other[row] for row in texts)
                    add(f"{label}_identical", same / len(texts))
    report.tell(
        "drafts", report.medians(samples), rounds=rounds, packages=("torch", "transformers"),
        as_json=arguments.json, samples=samples, threads=1,
    )  # fmt: skip


if __name__ == "__main__":
    main()
