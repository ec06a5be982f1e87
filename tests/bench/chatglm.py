"""ChatGLM against the loops and the attention of the original implementation, and the real shape on
a GPU.

    python -m tests.bench.chatglm [--quick] [--json]
        on a CPU: tiny, mid-small and mid shapes
    python -m tests.bench.chatglm --device cuda [--folder FOLDER]
        the 6B shape, random weights, on one GPU

The original cannot be shipped. The baseline is a re-creation (chatglm_reference.py) of how it
works: sequence-first manual attention with its layer scaling, logits of every position, one row at
a time, rows padded to their full length, gradient checkpointing; same weights, same maths. Its own
speed, measured once with the original, is in docs/benchmarks.md for comparison.

Loops: greedy: prompt 34, 64 new tokens, KV cache. prefill: one prompt of 256. train: samples of 64
+ 64 tokens, batch 1, accumulation 16, pre_seq_len 128, dropout 0.1, AdamW, clip 1. evaluation:
64-token prompts, 65 sampled tokens (top_p 0.7, temperature 0.95), pre_seq_len 128. One thread,
fp32; ours and the baseline alternate, ratios are medians over rounds.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, PrefixCache
from chat.chatglm.positions import position_ids
from chat.engine.adapters import KVPrefix, save
from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import Loaded, from_parts
from chat.engine.request import AdapterRef, Request, SamplingParams
from tests.bench import report
from tests.bench.chatglm_reference import ReferenceStyle
from tests.support.tiny_chatglm import tiny_folder
from tuning.ptuning.prefix import PrefixEncoder
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.trainer import Trainer

SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "num_layers": 4,
        "num_attention_heads": 4,
        "inner_hidden_size": 256,
        "vocab_size": 1408,
    },
    "mid-small": {
        "hidden_size": 512,
        "num_layers": 8,
        "num_attention_heads": 8,
        "inner_hidden_size": 2048,
        "vocab_size": 1408,
    },
    "mid": {
        "hidden_size": 512,
        "num_layers": 8,
        "num_attention_heads": 8,
        "inner_hidden_size": 2048,
        "vocab_size": 130528,
    },
    "6b": {},  # the defaults
}
SMALL_IDS = {
    "bos_token_id": 1004,
    "eos_token_id": 1005,
    "mask_token_id": 1000,
    "gmask_token_id": 1001,
    "pad_token_id": 3,
}
PROMPT, NEW, LONG_PROMPT, SOURCE, TARGET, PREFIX = 34, 64, 256, 64, 64, 128
PREFILLS = 8  # a round; one takes 5 ms at the tiny shape


def configuration(shape: str) -> ChatGLMConfig:
    # The small vocabulary's special ids also in the big embedding: its rows beyond 1,407 are never
    # written, as for most tokens.
    return ChatGLMConfig(**SHAPES[shape], **({} if shape == "6b" else SMALL_IDS))


def prompt_ids(length: int, config: ChatGLMConfig, seed: int = 0) -> list[int]:
    draw = torch.randint(5, 900, (length - 2,), generator=torch.Generator().manual_seed(seed))
    return [*draw.tolist(), config.gmask_token_id, config.bos_token_id]


class Contest:
    """Ours and the baseline on one shape. Each method does one round's work and returns how much it
    did.
    """

    def __init__(self, shape: str, folder: Path, quick: bool):
        torch.manual_seed(0)
        self.config = configuration(shape)
        model = ChatGLMForConditionalGeneration(self.config).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder(folder / "vocabulary"))
        self.reference = ReferenceStyle(model)  # shares the weights
        self.loaded = from_parts(model, tokenizer)
        self.loaded.prompter.end_ids = frozenset()
        self.samples = 4 if quick and shape != "tiny" else 16
        self.rows = 8 if quick and shape != "tiny" else 32
        length = self.loaded.head_dim
        tensor = (
            torch.randn(self.config.num_layers, 2, self.config.num_attention_heads, PREFIX, length)
            * 0.1
        )
        save(KVPrefix(tensor, False, ""), folder / shape)
        self.adapter = AdapterRef(shape, str(folder / shape))
        # as the original keeps it: [2, P, batch, heads, dim] a layer
        self.prefix = [layer.permute(0, 2, 1, 3)[:, :, None] for layer in tensor]
        draw = torch.Generator().manual_seed(1)
        pieces = [tokenizer.decode([index]) for index in range(300, 900)]
        words = [piece for piece in pieces if piece.strip()]
        self.examples = [
            {
                "prompt": "".join(
                    words[i] for i in torch.randint(0, len(words), (200,), generator=draw)
                ),
                "response": "".join(
                    words[i] for i in torch.randint(0, len(words), (200,), generator=draw)
                ),
                "history": [],
            }
            for _ in range(16)
        ]

    def agree(self) -> float:
        """Largest difference of the two's logits: they are to be compared only if they compute the
        same.
        """
        row, positions, mask = self.reference.start(prompt_ids(PROMPT, self.config))
        theirs = self.reference(row, positions, mask, self.prefix)[0]
        tensor = torch.stack([layer[:, :, 0].transpose(1, 2) for layer in self.prefix])
        return (
            (self.loaded.model(input_ids=row, past_key_values=PrefixCache(tensor)).logits - theirs)
            .abs()
            .max()
            .item()
        )

    def _engine(self, rows: int, prefix_room: int = 0) -> Engine:
        return Engine(
            self.loaded,
            EngineConfig(
                max_rows=rows, max_length=160, prefix_room=prefix_room, reuse_prompts=False
            ),
        )

    def greedy_ours(self) -> int:
        sampling = SamplingParams(do_sample=False, max_new_tokens=NEW)
        ids = tuple(prompt_ids(PROMPT, self.config))
        (answer,) = self._engine(1).generate([Request(id="a", prompt_ids=ids, sampling=sampling)])
        return len(answer.token_ids)

    def greedy_theirs(self) -> int:
        return len(self.reference.generate(prompt_ids(PROMPT, self.config), NEW))

    @torch.no_grad()
    def prefill_ours(self) -> int:
        row = torch.tensor([prompt_ids(LONG_PROMPT, self.config)])
        for _ in range(PREFILLS):
            self.loaded.model(input_ids=row, logits_to_keep=1)
        return row.shape[1] * PREFILLS

    @torch.no_grad()
    def prefill_theirs(self) -> int:
        for _ in range(PREFILLS):
            row, positions, mask = self.reference.start(prompt_ids(LONG_PROMPT, self.config))
            self.reference(row, positions, mask)
        return row.shape[1] * PREFILLS

    def train_ours(self) -> tuple[int, float]:
        """The second step of a run: what comes once, such as building the trainer, is not a matter
        of samples.
        """
        recipe = Recipe(
            max_steps=2,
            max_source_length=SOURCE,
            max_target_length=TARGET,
            pre_seq_len=PREFIX,
            prefix_dropout=0.1,
            gradient_accumulation_steps=self.samples,
            logging_steps=1,
        )
        stamps: list[float] = []
        Trainer(
            self.loaded, recipe, self.examples, report=lambda _: stamps.append(time.process_time())
        ).train()
        return self.samples, stamps[1] - stamps[0]

    def train_theirs(self) -> int:
        config, prompter = self.config, self.loaded.prompter
        encoder = PrefixEncoder(
            pre_seq_len=PREFIX,
            layers=config.num_layers,
            kv_heads=config.num_attention_heads,
            head_dim=config.head_dim,
        )
        optimiser = torch.optim.AdamW(encoder.parameters(), lr=2e-2, weight_decay=0.0)
        for example in self.examples[: self.samples]:
            ids, labels = prompter.training_ids(
                [{"role": "user", "content": example["prompt"]}],
                example["response"],
                SOURCE,
                TARGET,
            )
            padding = SOURCE + TARGET - len(ids)
            row, positions, mask = self.reference.start(ids + [config.pad_token_id] * padding)
            prefix = functional.dropout(encoder(), 0.1).permute(0, 1, 3, 2, 4)[:, :, :, None]
            logits, _ = self.reference(row, positions, mask, list(prefix), replay=True)
            targets = torch.tensor(labels + [-100] * padding)
            loss = functional.cross_entropy(logits[0, :-1].float(), targets[1:], ignore_index=-100)
            (loss / self.samples).backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimiser.step()
        return self.samples

    def evaluation_ours(self) -> int:
        requests = [
            Request(
                id=str(row),
                prompt_ids=tuple(prompt_ids(SOURCE, self.config, seed=row)),
                adapter=self.adapter,
                sampling=SamplingParams(
                    temperature=0.95, top_p=0.7, top_k=50, max_new_tokens=TARGET + 1, seed=row
                ),
            )
            for row in range(self.rows)
        ]
        answers = self._engine(self.rows, prefix_room=PREFIX).generate(requests)
        assert all(len(answer.token_ids) == TARGET + 1 for answer in answers), answers[0]
        return len(answers)

    def evaluation_theirs(self) -> int:
        rows = 2 if self.rows == 8 else 4
        for row in range(rows):
            ids = prompt_ids(SOURCE, self.config, seed=row)
            self.reference.generate(ids, TARGET + 1, prefix=self.prefix, sample=True)
        return rows


def per_cpu_second(work: Callable[[], int | tuple[int, float]]) -> float:
    """work returns how much it did, and in how many CPU-seconds if not all of its time counts."""
    began = time.process_time()
    done = work()
    seconds = time.process_time() - began
    done, seconds = done if isinstance(done, tuple) else (done, seconds)
    return done / seconds


def cpu(quick: bool, rounds: int) -> dict[str, float]:
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for shape in ("tiny", "mid-small", "mid"):
            contest = Contest(shape, Path(folder), quick)
            difference = contest.agree()
            if difference > 1e-2:
                raise SystemExit(
                    f"{shape}: ours and the baseline differ by {difference}: nothing to compare"
                )
            for loop in ("greedy", "prefill", "train", "evaluation"):
                ours, theirs = getattr(contest, f"{loop}_ours"), getattr(contest, f"{loop}_theirs")
                ours(), theirs()  # warm: products are prepared once for a shape
                speeds = [(per_cpu_second(ours), per_cpu_second(theirs)) for _ in range(rounds)]
                name = f"{shape.replace('-', '_')}_{loop}"
                results[f"{name}_per_cpu_s"] = statistics.median(speed for speed, _ in speeds)
                results[f"{name}_reference_style_per_cpu_s"] = statistics.median(
                    speed for _, speed in speeds
                )
                ratios = [mine / other for mine, other in speeds]
                results[f"{name}_vs_reference_style"] = statistics.median(ratios)
                spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
                print(
                    f"{shape:10} {loop:11} ours {results[f'{name}_per_cpu_s']:9.2f}  baseline "
                    f"{results[f'{name}_reference_style_per_cpu_s']:9.2f}  ratio "
                    f"{statistics.median(ratios):.2f} ({spread})",
                    flush=True,
                )
            if shape == "mid":
                results["train_vs_upstream"] = results["mid_train_vs_reference_style"]
                results["eval_vs_upstream"] = results["mid_evaluation_vs_reference_style"]
            del contest
    results["peak_mib"] = report.peak_mib()
    return results


# On a device: the real shape


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return report.peak_mib() / 1024


def make_checkpoint(shape: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Path:
    """Random weights of the shape in an official-layout folder; left alone if it is there
    already.
    """
    if not (folder / "config.json").is_file():
        with default_dtype(dtype), torch.device(device):
            model = ChatGLMForConditionalGeneration(configuration(shape))
        model.save_pretrained(folder, max_shard_size="2GB")
        # the small vocabulary does for any shape: what counts is the number of tokens, and special
        # ids are the config's
        for name in ("ice_text.model", "tokenizer_config.json"):
            shutil.copyfile(tiny_folder(folder / "tiny") / name, folder / name)
    return folder


@torch.no_grad()
def decode_speed(
    model: ChatGLMForConditionalGeneration, batch: int, prompt: int, steps: int
) -> tuple[float, float]:
    """(seconds of the prefill, decoded tokens per second) of plain forward passes."""
    device = model.device
    ids = torch.tensor([prompt_ids(prompt, model.config)] * batch, device=device)
    positions = position_ids(ids, model.config)
    wait_for(device)
    began = time.perf_counter()
    output = model(input_ids=ids, position_ids=positions, logits_to_keep=1, use_cache=True)
    wait_for(device)
    prefill, began = time.perf_counter() - began, time.perf_counter()
    step = torch.tensor([[[0], [1]]], device=device)
    positions = positions[:, :, -1:]
    for _ in range(steps):
        positions = positions + step
        ids = output.logits[:, -1:].argmax(-1)
        output = model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    wait_for(device)
    return prefill, batch * steps / (time.perf_counter() - began)


def bandwidth(device: torch.device) -> float:
    """Bytes per second that the device copies, read and written."""
    source = torch.empty(
        1 << (28 if device.type == "cuda" else 24), dtype=torch.float16, device=device
    )
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    wait_for(device)
    began = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    wait_for(device)
    return 10 * 2 * source.nbytes / (time.perf_counter() - began)


def train_speed(loaded: Loaded, steps: int) -> float:
    """Samples per second at train.sh's preset: 16 samples of 64 + 64 tokens a step, P = 128."""
    examples = [{"prompt": "好" * 200, "response": "好" * 200, "history": []}] * 16
    recipe = Recipe(max_steps=1 + steps, pre_seq_len=PREFIX, prefix_dropout=0.1, logging_steps=1)
    stamps: list[float] = []

    def report(progress) -> bool:
        wait_for(loaded.device)
        stamps.append(time.perf_counter())
        return False

    Trainer(loaded, recipe, examples, report=report).train()
    return 16 * steps / (stamps[-1] - stamps[0])


def on_device(device: torch.device, shape: str, folder: Path, quick: bool) -> dict[str, float]:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    make_checkpoint(shape, folder, device, dtype)
    copied = bandwidth(device)
    results = {"copy_gb_per_s": copied / 1e9}
    steps, prompts = (8, (64,)) if quick else (64, (64, 512, 2048))
    for name, bits in (("fp16", None), ("int8", 8), ("int4", 4)):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        options = {} if bits is None else {"quantization_bit": bits}
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, **options
        ).eval()
        wait_for(device)
        results[f"{name}_load_seconds"] = time.perf_counter() - began
        model.requires_grad_(False)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        results[f"{name}_weights_gib"] = weights / 2**30
        decode_speed(model, 1, 64, 2)  # warm: kernels, tuning
        for batch in (1, 16, 64):
            for prompt in prompts:
                if prompt > model.config.max_sequence_length:
                    continue
                try:
                    prefill, speed = decode_speed(model, batch, prompt, steps)
                except torch.OutOfMemoryError:
                    print(f"{name} batch {batch:2} prompt {prompt:4}: does not fit")
                    continue
                results[f"{name}_prefill_ms_b{batch}_p{prompt}"] = prefill * 1e3
                results[f"{name}_tok_per_s_b{batch}_p{prompt}"] = speed
                print(
                    f"{name} batch {batch:2} prompt {prompt:4}: prefill {prefill * 1e3:8.1f} ms, "
                    f"{speed:8.1f} tokens/s"
                )
        # a copy reads and writes each byte; decoding one row reads each weight once
        results[f"{name}_roofline_fraction_b1"] = (
            results[f"{name}_tok_per_s_b1_p{prompts[0]}"] * weights / (copied / 2)
        )
        results[f"peak_gib_{name}"] = peak_gib(device)
        if name != "int8":
            loaded = from_parts(
                model, AutoTokenizer.from_pretrained(folder), device=device, dtype=dtype
            )
            results[f"{name}_train_samples_per_s"] = train_speed(loaded, 1 if quick else 4)
            results[f"{name}_train_peak_gib"] = peak_gib(device)
            del loaded
        del model
    return results


def main() -> None:
    parser = report.arguments(__doc__, "smaller rounds, about a minute")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--device", default="cpu", help="cuda: measure the 6B shape there")
    parser.add_argument(
        "--shape",
        choices=list(SHAPES),
        help="measure this shape on --device instead of the contest",
    )
    parser.add_argument(
        "--folder", type=Path, help="a ChatGLM checkpoint, or where to put the random one (kept)"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    rounds = options.rounds or (1 if options.quick else 5)
    if device.type == "cpu" and options.shape is None:
        results = cpu(options.quick, rounds)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.folder or Path(temporary) / "checkpoint"
            results = on_device(device, options.shape or "6b", folder, options.quick)
    packages = ("torch", "transformers")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    report.tell(
        "chatglm",
        results,
        rounds=rounds,
        packages=packages,
        as_json=options.json,
        device=name,
        threads=1,
    )


if __name__ == "__main__":
    main()
