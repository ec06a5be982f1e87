"""The engine against plain generation, static batching and transformers' own continuous batching.

    python -m tests.bench.engine [--quick] [--json]

One process, one thread, fp32, a random Qwen2 of 30 million parameters; prompts of 16-96 tokens,
answers of 32-128, greedy. Ours and the baselines alternate; throughput is answer tokens per
CPU-second, ratios are medians over rounds. A closed loop keeps N requests in flight. Time to first
token is wall time in a burst, so it wants a quiet machine.
"""

from __future__ import annotations

import copy
import gc
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

from chat.engine.adapters import KVPrefix, save
from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import Loaded, from_parts
from chat.engine.request import AdapterRef, Request, SamplingParams
from tests.bench import engine_sse, report

VOCABULARY = 8192
PREFIX_LENGTHS = (20, 64, 128, 20, 64, 128, 20, 64)


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    tokens: int


def jobs(count: int, seed: int) -> list[Job]:
    draw = random.Random(seed)
    return [
        Job(
            tuple(draw.randrange(10, VOCABULARY) for _ in range(draw.randint(16, 96))),
            draw.randint(32, 128),
        )
        for _ in range(count)
    ]


def tokenizer(chinese: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE over made-up words: Chinese and English, so that detokenising meets multi-byte
    characters; or of letters alone, where every token is text at once.
    """
    draw = random.Random(0)
    characters = (
        [chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(1500)]
        if chinese
        else string.ascii_letters
    )
    lines = [
        "".join(draw.choices(characters, k=20)) + " " + "".join(draw.choices("etaoin shrdlu", k=30))
        for _ in range(3000)
    ]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if chinese else []
    backend.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def model() -> tuple[Loaded, Qwen2ForCausalLM]:
    """The same weights twice: as the engine loads them, and as transformers has them, for the
    baselines.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    plain = Qwen2ForCausalLM(config).eval()
    loaded = from_parts(copy.deepcopy(plain), tokenizer())
    loaded.prompter.end_ids = frozenset()  # every answer has the length that its job asks for
    return loaded, plain


class Contestants:
    """Each method answers jobs with at most `concurrent` in flight."""

    def __init__(self, loaded: Loaded, plain: Qwen2ForCausalLM, folder: str):
        self.loaded, self.model = loaded, plain
        self.adapters = []
        for number, length in enumerate(PREFIX_LENGTHS):
            tensor = torch.randn(loaded.layers, 2, loaded.kv_heads, length, loaded.head_dim) * 0.1
            save(KVPrefix(tensor, True, ""), f"{folder}/{number}")
            self.adapters.append(AdapterRef(f"adapter-{number}", f"{folder}/{number}"))
        self.first_tokens: dict[str, list[float]] = {}

    def ours(self, work: list[Job], concurrent: int, adapters: bool = False) -> None:
        engine = Engine(self.loaded, EngineConfig(max_rows=concurrent, queue_limit=len(work)))
        waits: list[float] = []

        def sink(event) -> None:
            if event.terminal:
                assert event.type == "finished", event.data
                waits.append(event.data["timings"]["queued_s"] + event.data["timings"]["prefill_s"])

        for number, job in enumerate(work):
            engine.submit(
                Request(
                    id=str(number),
                    prompt_ids=job.prompt,
                    adapter=self.adapters[number % len(self.adapters)] if adapters else None,
                    sampling=SamplingParams(do_sample=False, max_new_tokens=job.tokens),
                    user=str(number % 8),
                ),
                sink,
            )
        while len(waits) < len(work):
            engine.step()
        self.first_tokens["ours"] = waits
        engine.close()

    def sequential(self, work: list[Job], concurrent: int = 1) -> None:
        for job in work:
            self._generate([job], job.tokens)

    def static(self, work: list[Job], concurrent: int) -> None:
        for start in range(0, len(work), concurrent):
            batch = work[start : start + concurrent]
            self._generate(batch, max(job.tokens for job in batch))

    def _generate(self, batch: list[Job], tokens: int) -> None:
        longest = max(len(job.prompt) for job in batch)
        ids = torch.tensor([[0] * (longest - len(job.prompt)) + list(job.prompt) for job in batch])
        mask = torch.tensor(
            [[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in batch]
        )
        self.model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)

    def continuous_batching(self, work: list[Job], concurrent: int) -> None:
        """transformers' own, under SDPA, its cache bounded so that it does not try to take all
        memory.
        """
        settings = ContinuousBatchingConfig(
            num_blocks=max(16, concurrent * 2),
            max_batch_tokens=512,
            max_requests_per_batch=concurrent,
        )
        generation = GenerationConfig(
            do_sample=False, max_new_tokens=128, eos_token_id=-1, pad_token_id=0
        )
        waits = []
        with self.model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=settings
        ) as manager:
            began: dict[str, float] = {}
            waiting = list(enumerate(work))
            done = 0
            while done < len(work):
                while waiting and len(began) - done < concurrent:
                    number, job = waiting.pop(0)
                    began[str(number)] = time.perf_counter()
                    manager.add_request(
                        list(job.prompt),
                        request_id=str(number),
                        max_new_tokens=job.tokens,
                        record_timestamps=True,
                    )
                result = manager.get_result(timeout=0.5)
                if result is not None and result.is_finished():
                    done += 1
                    assert len(result.generated_tokens) == work[int(result.request_id)].tokens, (
                        result.error
                    )
                    waits.append(result.timestamps[0] - began[result.request_id])
        self.first_tokens["cb"] = waits
        gc.collect()


def join_stall(loaded: Loaded) -> float:
    """p99 / p50 of the CPU time between two tokens of 8 running streams, while 8 prompts of 200-800
    tokens join them.
    """
    engine = Engine(loaded, EngineConfig(max_rows=16, reuse_prompts=False))
    draw = random.Random(5)
    seen: dict[str, float] = {}
    gaps: list[float] = []

    def sink(event) -> None:
        if event.type == "delta":
            now = time.process_time()
            if event.id in seen:
                gaps.append((now - seen[event.id]) / event.data["tokens"])
            seen[event.id] = now

    def submit(name: str, length: int, tokens: int) -> None:
        prompt = tuple(draw.randrange(300, VOCABULARY) for _ in range(length))
        sampling = SamplingParams(do_sample=False, max_new_tokens=tokens)
        engine.submit(Request(id=name, prompt_ids=prompt, sampling=sampling), sink)

    for number in range(8):
        submit(f"stream {number}", 30, 160)
    steps = 0
    while engine.step():
        steps += 1
        if steps % 12 == 10 and steps < 106:
            submit(f"late {steps}", draw.randint(200, 800), 20)
    engine.close()
    return _p99(gaps) / statistics.median(gaps)


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def rate(run: Callable[[], None], work: list[Job]) -> float:
    """Answer tokens per CPU-second."""
    began = time.process_time()
    run()
    return sum(job.tokens for job in work) / (time.process_time() - began)


def detokenising(loaded: Loaded, tokens: int = 2048) -> float:
    """Microseconds a token, over one long answer."""
    draw = random.Random(1)
    ids = [draw.randrange(300, VOCABULARY) for _ in range(tokens)]
    stream = loaded.prompter.detokenizer()
    began = time.process_time()
    for token in ids:
        stream.step(token)
    return (time.process_time() - began) / tokens * 1e6


def peak_mib() -> float:
    """Peak resident memory of a process that serves 32 at once and runs no baseline."""
    code = "from tests.bench.engine import peak_child; peak_child()"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return float(output.strip().splitlines()[-1])


def peak_child() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        Contestants(*model(), folder).ours(jobs(32, 0), 32)
    print(report.peak_mib())


def measure(
    quick: bool, rounds: int, only: set[str] | None = None
) -> tuple[dict[str, float], dict[str, list[float]]]:
    samples: dict[str, list[float]] = {}

    def add(key: str, value: float) -> None:
        samples.setdefault(key, []).append(value)

    def wanted(key: str) -> bool:
        return only is None or key in only

    with tempfile.TemporaryDirectory() as folder:
        loaded, plain = model()
        them = Contestants(loaded, plain, folder)
        them.ours(jobs(2, 99), 2)
        them.sequential(jobs(1, 99))
        for number in range(rounds):
            few = jobs(3 if quick else 6, number)
            sequential = rate(partial(them.sequential, few), few)
            add("sequential_tok_per_cpu_s", sequential)
            if wanted("c1"):
                add("c1_vs_generate", rate(partial(them.ours, few, 1), few) / sequential)
            if wanted("c4"):
                work = jobs(8 if quick else 16, number)
                add("c4_tok_per_cpu_s", rate(partial(them.ours, work, 4), work))
                add("c4_vs_sequential", samples["c4_tok_per_cpu_s"][-1] / sequential)
            if wanted("c16"):
                work = jobs(32 if quick else 64, number)
                ours = rate(partial(them.ours, work, 16), work)
                add("c16_tok_per_cpu_s", ours)
                add("c16_vs_sequential", ours / sequential)
                add("c16_vs_cb", ours / rate(partial(them.continuous_batching, work, 16), work))
                add("c16_vs_static", ours / rate(partial(them.static, work, 16), work))
                add(
                    "mixed8_vs_plain",
                    rate(partial(them.ours, work, 16, adapters=True), work) / ours,
                )
            if wanted("c32"):
                work = jobs(64 if quick else 128, number)
                ours = rate(partial(them.ours, work, 32), work)
                add("c32_tok_per_cpu_s", ours)
                add("c32_vs_cb", ours / rate(partial(them.continuous_batching, work, 32), work))
            if wanted("burst"):
                work = jobs(32, 1000 + number)
                them.ours(work, 32)
                them.continuous_batching(work, 32)
                first = {
                    name: statistics.median(waits) for name, waits in them.first_tokens.items()
                }
                add("burst32_ttft_ms", first["ours"] * 1e3)
                add("burst32_ttft_vs_cb", first["ours"] / first["cb"])
            if wanted("c64"):
                work = jobs(64 if quick else 128, number)
                add("c64_tok_per_cpu_s", rate(partial(them.ours, work, 64), work))
            if wanted("join"):
                add("join_p99_over_p50", join_stall(loaded))
            if wanted("detok"):
                add("detok_us_per_token", detokenising(loaded))
    if wanted("sse"):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            asked = 32 if quick else 64
            for waits in engine_sse.measure(
                Path(folder), model()[1], tokenizer(chinese=False), rounds, asked
            ):
                add("sse16_ttft_p50_ms", statistics.median(waits["ours"]) * 1e3)
                add("sse16_ttft_p99_ms", _p99(waits["ours"]) * 1e3)
                add(
                    "sse16_ttft_p50_vs_serve",
                    statistics.median(waits["ours"]) / statistics.median(waits["serve"]),
                )
                add("sse16_ttft_p99_vs_serve", _p99(waits["ours"]) / _p99(waits["serve"]))
    results = {key: statistics.median(values) for key, values in samples.items()}
    if wanted("peak"):
        results["peak_mib"] = peak_mib()
    return results, samples


def main() -> None:
    parser = report.arguments(__doc__, "about a minute")
    parser.add_argument("--rounds", type=int, help="default 5, quick 2")
    parser.add_argument(
        "--only", help="comma-separated: c1, c4, c16, c32, c64, burst, join, detok, sse, peak"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    results, samples = measure(
        arguments.quick, rounds, set(arguments.only.split(",")) if arguments.only else None
    )
    packages = ("torch", "transformers")
    report.tell(
        "engine",
        results,
        rounds=rounds,
        packages=packages,
        as_json=arguments.json,
        samples=samples,
        threads=1,
    )


if __name__ == "__main__":
    main()
