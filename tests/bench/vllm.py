"""The engine against vLLM on the same prompts, and prefixes through vLLM's KV connector
(vllm_prefix/) against none.

    python -m tests.bench.vllm [--quick] [--json]

SmolLM2-135M-Instruct, 32 prompts of 16-80 words, 96 tokens each, greedy; one process and one thread
on each side, alternating; answer tokens per CPU-second, ratios are medians over rounds. `c16`: at
most 16 requests in flight. `ttft32`: 32 at once, CPU time to the median request's first token
(smaller is better). `mixed8`: a quarter of the rows bare, the others with 8 prefixes of 16 to 256
tokens. `connector`: the same through vLLM, and how many answers are ours, token for token.

The first run installs vLLM in an environment of its own in the data folder
(tests/vllm/environment.py); where that cannot be done, the benchmark says why and measures nothing.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers

from chat.engine.adapters import KVPrefix, save
from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import Loaded, load
from chat.engine.request import AdapterRef, Request, SamplingParams
from tests.bench import report
from tests.vllm import environment

PREFIX_LENGTHS = (16, 20, 64, 100, 128, 130, 200, 256)
WORDS = """
    time year people way day man thing woman life child world school state family student group
    country problem hand part place case week company system program question work government number
    night point home water room mother area money story fact month lot right study book eye job word
    business issue side kind head house service friend father power hour
""".split()  # noqa: SIM905
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Job:
    """prefix: name of an adapter, or None. length: its tokens."""

    prompt: list[int]
    tokens: int
    prefix: str | None = None
    length: int = 0


@dataclass(frozen=True)
class Run:
    """CPU-seconds of all jobs, answer tokens, and each job's CPU-seconds to its first token."""

    cpu_s: float
    tokens: int
    first_s: list[float]
    answers: list[list[int]] | None = None

    @property
    def rate(self) -> float:
        return self.tokens / self.cpu_s


class Ours:
    """The engine in this process."""

    drafts = False  # vLLM makes none by itself

    def __init__(self, folder: Path, adapters: Path, dtype: str):
        self.loaded = load(folder, device="cpu", dtype=getattr(torch, dtype))
        self.loaded.prompter.end_ids = (
            frozenset()
        )  # every answer has the length that its job asks for
        self.adapters = adapters

    def run(self, jobs: list[Job], concurrent: int) -> Run:
        engine = Engine(
            self.loaded,
            EngineConfig(max_rows=concurrent, queue_limit=len(jobs), drafts=self.drafts),
        )
        first = [0.0 for _ in jobs]
        written: list[int] = []
        began = time.process_time()

        def sink(event) -> None:
            number = int(event.id)
            if event.type == "delta" and not first[number]:
                first[number] = time.process_time() - began
            if event.terminal:
                assert event.type == "finished", event.data
                written.append(event.data["usage"]["completion_tokens"])

        for number, job in enumerate(jobs):
            engine.submit(self._request(number, job), sink)
        while len(written) < len(jobs):
            engine.step()
        spent = time.process_time() - began
        engine.close()
        return Run(spent, sum(written), first)

    def answers(self, jobs: list[Job]) -> list[list[int]]:
        engine = Engine(self.loaded, EngineConfig(max_rows=32, queue_limit=len(jobs)))
        found = engine.generate(self._request(number, job) for number, job in enumerate(jobs))
        engine.close()
        return [list(answer.token_ids) for answer in found]

    def _request(self, number: int, job: Job) -> Request:
        adapter = AdapterRef(job.prefix, str(self.adapters / job.prefix)) if job.prefix else None
        sampling = SamplingParams(do_sample=False, max_new_tokens=job.tokens)
        return Request(
            str(number), prompt_ids=tuple(job.prompt), adapter=adapter, sampling=sampling
        )


class Theirs:
    """vLLM in a process of its own (tests/bench/vllm_child.py)."""

    def __init__(self, folder: Path, dtype: str, eager: bool, **settings):
        settings = {
            "model": str(folder),
            "dtype": dtype,
            "enforce_eager": eager,
            "max_model_len": 1024,
            "max_num_seqs": 32,
            **settings,
        }
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            # -P: the folder of the script has a vllm.py of its own
            [
                environment.python(),
                "-P",
                Path(__file__).with_name("vllm_child.py"),
                json.dumps(settings),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment.variables(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
        )
        began = time.monotonic()
        self._answer()
        print(f"vLLM is ready in {dtype}  ({time.monotonic() - began:.0f} s)", flush=True)

    def run(self, jobs: list[Job], concurrent: int) -> Run:
        self._process.stdin.write(
            json.dumps({"jobs": [asdict(job) for job in jobs], "concurrent": concurrent}) + "\n"
        )
        self._process.stdin.flush()
        return Run(**self._answer())

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise SystemExit(f"vLLM ended:\n{self._log.read()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


def jobs(loaded: Loaded, count: int, tokens: int, seed: int) -> list[Job]:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(16, 80))) for _ in range(count)]
    return [Job(loaded.tokenizer.encode(text, add_special_tokens=False), tokens) for text in texts]


def make_adapters(loaded: Loaded, folder: Path) -> list[tuple[str, int]]:
    """(name, length) of prefixes that change answers and do not wreck them: keys and values of
    texts.
    """
    made = []
    for number, length in enumerate(PREFIX_LENGTHS):
        draw = random.Random(number)
        ids = loaded.tokenizer.encode(
            " ".join(draw.choices(WORDS, k=length)), add_special_tokens=False
        )[:length]
        with torch.no_grad():
            cache = loaded.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
        tensor = torch.stack(
            [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        ).float()
        name = save(KVPrefix(tensor, True, loaded.fingerprint), folder / "new")
        (folder / "new").replace(folder / name)
        made.append((name, length))
    return made


def mixed(work: list[Job], adapters: list[tuple[str, int]]) -> list[Job]:
    """Every fourth row stays bare."""
    tuned = [
        Job(job.prompt, job.tokens, *adapters[i % len(adapters)]) for i, job in enumerate(work)
    ]
    return [
        bare if i % 4 == 3 else job for i, (bare, job) in enumerate(zip(work, tuned, strict=True))
    ]


def measure(quick: bool, rounds: int, only: set[str] | None, eager: bool) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {}

    def add(key: str, value: float) -> None:
        samples.setdefault(key, []).append(value)
        print(f"  {key} {value:.4g}", flush=True)

    def wanted(key: str) -> bool:
        return only is None or key in only

    count, tokens = (16, 24) if quick else (32, 96)
    model = environment.model()
    with tempfile.TemporaryDirectory(prefix="bench-vllm-") as place:
        folder = Path(place)
        for name, dtype in DTYPES.items():
            if not wanted(name):
                continue
            ours, theirs = Ours(model, folder / name, dtype), Theirs(model, dtype, eager)
            for side in (ours, theirs):
                side.run(jobs(ours.loaded, 2, 8, 99), 2)
            adapters = make_adapters(ours.loaded, folder / name) if name == "fp32" else []
            for number in range(rounds):
                for concurrent in (1, 16, 32):
                    work = jobs(
                        ours.loaded,
                        4 if concurrent == 1 else count,
                        tokens,
                        1000 * number + concurrent,
                    )
                    mine, other = ours.run(work, concurrent), theirs.run(work, concurrent)
                    add(f"{name}_c{concurrent}_vs_vllm", mine.rate / other.rate)
                    add(f"{name}_c{concurrent}_tok_per_cpu_s", mine.rate)
                    add(f"vllm_{name}_c{concurrent}_tok_per_cpu_s", other.rate)
                if adapters:
                    add(
                        "ttft32_vs_vllm",
                        statistics.median(mine.first_s) / statistics.median(other.first_s),
                    )
                    tuned = ours.run(
                        mixed(jobs(ours.loaded, count, tokens, 1000 * number + 33), adapters), 32
                    )
                    add("mixed8_vs_plain", tuned.rate / mine.rate)
            theirs.close()
        if wanted("connector"):
            _measure_connector(add, folder / "connector", count, tokens, rounds, eager)
    return samples


def _measure_connector(
    add, folder: Path, count: int, tokens: int, rounds: int, eager: bool
) -> None:
    ours = Ours(environment.model(), folder, "float32")
    adapters = make_adapters(ours.loaded, folder)
    theirs = Theirs(
        environment.model(),
        "float32",
        eager,
        kv_transfer_config=environment.kv_transfer_config(folder),
    )
    theirs.run(jobs(ours.loaded, 2, 8, 99), 2)
    for number in range(rounds):
        plain = theirs.run(jobs(ours.loaded, count, tokens, 1000 * number + 40), 32)
        work = mixed(jobs(ours.loaded, count, tokens, 1000 * number + 41), adapters)
        tuned = theirs.run(work, 32)
        add("connector_mixed8_vs_plain", tuned.rate / plain.rate)
        expected = ours.answers(work)
        same = sum(mine == other for mine, other in zip(expected, tuned.answers, strict=True))
        add("connector_identical_fraction", same / len(work))
    theirs.close()


def main() -> None:
    parser = report.arguments(__doc__, "fewer and shorter answers, one round")
    parser.add_argument("--rounds", type=int, help="default 3, quick 1")
    parser.add_argument("--only", help="comma-separated: fp32, bf16, connector")
    parser.add_argument(
        "--eager",
        action="store_true",
        default=shutil.which("g++") is None,
        help="vLLM without the compiled model that it makes at its start (default without g++)",
    )
    arguments = parser.parse_args()
    try:
        environment.install()
    except environment.NotInstalled as reason:
        print(f"skipped: {reason}")
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    only = set(arguments.only.split(",")) if arguments.only else None
    samples = measure(arguments.quick, rounds, only, arguments.eager)
    packages = ("torch", "transformers")
    results = report.medians(samples)
    report.tell(
        "vllm", results, rounds=rounds, packages=packages, as_json=arguments.json, samples=samples,
        threads=1, vllm=environment.VLLM[0],
    )  # fmt: skip


if __name__ == "__main__":
    main()
