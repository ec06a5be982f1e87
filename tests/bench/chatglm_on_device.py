"""The real shape of ChatGLM on one device: decoding, training, memory (tests/bench/chatglm.py)."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat.chatglm import ChatGLMForConditionalGeneration
from chat.chatglm.positions import position_ids
from chat.engine.loading import Loaded, from_parts
from tests.bench import report
from tests.bench.chatglm_shapes import (
    PREFIX,
    configuration,
    prompt_ids,
)
from tests.support.tiny_chatglm import tiny_folder
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.trainer import Trainer


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
