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
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn import functional
from transformers import AutoTokenizer

from chat.chatglm import ChatGLMForConditionalGeneration, PrefixCache
from chat.engine.adapters import KVPrefix, save
from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import from_parts
from chat.engine.request import AdapterRef, Request, SamplingParams
from tests.bench import report
from tests.bench.chatglm_on_device import on_device
from tests.bench.chatglm_reference import ReferenceStyle
from tests.bench.chatglm_shapes import (
    LONG_PROMPT,
    NEW,
    PREFILLS,
    PREFIX,
    PROMPT,
    SHAPES,
    SOURCE,
    TARGET,
    configuration,
    prompt_ids,
)
from tests.support.tiny_chatglm import tiny_folder
from tuning.ptuning.prefix import PrefixEncoder
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.trainer import Trainer


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
