"""One long prefix under many rows: read where it lies, or copied into every row's slot.

    python -m tests.bench.shared_prefix [--quick] [--json]

SmolLM2-135M-Instruct in float32 on one thread, prefixes of 128, 512 and 2,048 tokens under 32
greedy rows of 32 tokens, and the same rows bare: answer tokens per CPU-second, and by how
much serving them makes the process grow. `copied` is the engine without its flat forward,
alternating.

Needs the model's folder (`python -m tests.vllm.environment`, or VLLM_MODEL).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
import transformers

from chat.engine.adapters import KVPrefix, save
from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import Loaded, load
from chat.engine.request import LONGEST_PREFIX, AdapterRef, Request, SamplingParams
from tests.bench import report
from tests.bench.vllm import WORDS, jobs
from tests.vllm import environment

ROWS, LENGTHS = 32, (0, 128, 512, LONGEST_PREFIX)


def make_prefix(loaded: Loaded, folder: Path, length: int) -> AdapterRef:
    text = " ".join(WORDS[(7 * i * i + i) % len(WORDS)] for i in range(length))
    ids = loaded.tokenizer.encode(text, add_special_tokens=False)[:length]
    with torch.inference_mode():
        cache = loaded.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    prefix = KVPrefix(torch.stack(layers), True, loaded.fingerprint)
    return AdapterRef(save(prefix, folder / str(length)), str(folder / str(length)))


def run(
    loaded: Loaded, adapter: AdapterRef | None, tokens: int, compiled: bool
) -> tuple[float, float, list[tuple[int, ...]]]:
    """Answer tokens per CPU-second, growth in MiB, the answers."""
    process = psutil.Process()
    sampling = SamplingParams(do_sample=False, max_new_tokens=tokens)
    requests = [
        Request(str(number), prompt_ids=tuple(job.prompt), adapter=adapter, sampling=sampling)
        for number, job in enumerate(jobs(loaded, ROWS, tokens, 5))
    ]
    before = process.memory_info().rss
    config = EngineConfig(max_rows=ROWS, max_length=512, compiled=compiled, drafts=False)
    engine = Engine(loaded, config)
    began = process.cpu_times()
    answers = [answer.token_ids for answer in engine.generate(requests)]
    ended = process.cpu_times()
    grown = (process.memory_info().rss - before) / 2**20
    engine.close()
    spent = ended.user + ended.system - began.user - began.system
    return sum(map(len, answers)) / spent, grown, answers


def main() -> None:
    arguments = report.arguments(__doc__, "8 tokens, one round").parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if not (environment.model() / "config.json").is_file():
        raise SystemExit(environment.missing())
    loaded = load(environment.model(), device="cpu", dtype=torch.float32)
    loaded.prompter.end_ids = frozenset()
    tokens, rounds = (8, 1) if arguments.quick else (32, 2)
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-prefix-") as place:
        adapters = {n: make_prefix(loaded, Path(place), n) if n else None for n in LENGTHS}
        for compiled in (True, False):
            run(loaded, None, 2, compiled)
        for _ in range(rounds):
            for length, adapter in adapters.items():
                rates, answers = {}, {}
                for name, compiled in (("shared", True), ("copied", False)):
                    rate, grown, answers[name] = run(loaded, adapter, tokens, compiled)
                    rates[name] = rate
                    samples.setdefault(f"{name}_{length}_tok_per_cpu_s", []).append(rate)
                    samples.setdefault(f"{name}_{length}_grown_mib", []).append(grown)
                    print(f"  {name} {length}: {rate:.1f} tok/CPU-s, {grown:.0f} MiB", flush=True)
                same = sum(a == b for a, b in zip(*answers.values(), strict=True)) / ROWS
                samples.setdefault(f"identical_{length}", []).append(same)
                samples.setdefault(f"shared_vs_copied_{length}", []).append(
                    rates["shared"] / rates["copied"]
                )
    report.tell(
        "shared_prefix", report.medians(samples), rounds=rounds,
        packages=("torch", "transformers"), as_json=arguments.json, samples=samples, threads=1,
    )  # fmt: skip


if __name__ == "__main__":
    main()
