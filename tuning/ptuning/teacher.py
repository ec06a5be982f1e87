"""The frozen base as its own teacher: what it answers to general prompts without any prefix, and
how sure it is of every word.

A prefix that is trained on the task alone forgets the rest (ChatGLM-6B's most common complaint).
The remedy costs a share of rows a step: on general prompts that the base answered itself, the
prefixed model's distribution is held to the base's own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import Loaded
from chat.engine.prompts import IGNORED
from chat.engine.request import Request, SamplingParams

TOP_K = 20  # log-probabilities kept of each answer token; what lies below counts as one word


@dataclass(frozen=True)
class Lesson:
    """One general prompt with the base's answer.

    ids, labels: as of a training row. top_ids, top_logprobs: [n, TOP_K], the base's most likely
    words in place of each of the n labels that are predicted (all but the first of `labels`).
    """

    ids: list[int]
    labels: list[int]
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def lessons(
    loaded: Loaded,
    prompts: Sequence[str],
    *,
    max_source_length: int,
    max_target_length: int,
    folder: Path | None = None,
) -> list[Lesson]:
    """The base's answers (greedy) to `prompts`, with its log-probabilities.

    They are written once into a file of `folder` and read from there by whoever asks the same of
    the same weights. A prompt that the base answers with nothing teaches nothing: it is left out.
    """
    asked = json.dumps(
        [loaded.fingerprint, str(loaded.dtype), max_source_length, max_target_length, *prompts]
    )
    if folder is None:
        return _study(loaded, prompts, max_source_length, max_target_length)
    path = folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.safetensors"
    known = _read(path)
    if known is None:
        known = _study(loaded, prompts, max_source_length, max_target_length)
        _write(path, known)
    return known


def spread(prompts: Sequence[str], most: int) -> Sequence[str]:
    """At most `most` of the prompts, from all over the list: more than a short run will read need
    no answers.
    """
    if most >= len(prompts):
        return prompts
    return [prompts[number * len(prompts) // most] for number in range(most)]


def _study(
    loaded: Loaded, prompts: Sequence[str], max_source_length: int, max_target_length: int
) -> list[Lesson]:
    prompter = loaded.prompter
    asked = [
        prompter.prompt_ids([{"role": "user", "content": text}], max_source_length)
        for text in prompts
    ]
    longest = max_source_length + max_target_length
    engine = Engine(loaded, EngineConfig(max_rows=16, max_length=longest))
    try:
        answers = engine.generate(
            Request(
                str(number),
                prompt_ids=tuple(ids),
                sampling=SamplingParams(do_sample=False, max_new_tokens=max_target_length),
            )
            for number, ids in enumerate(asked)
        )
    finally:
        engine.close()
    end = prompter.response_ids("")[-1]
    found = []
    for ids, answer in zip(asked, answers, strict=True):
        said = [token for token in answer.token_ids if token not in prompter.end_ids]
        if answer.error is not None or not said:
            continue
        if answer.finish_reason == "stop":
            said.append(end)
        row = [*ids, *said]
        labels = [IGNORED] * len(ids) + said
        found.append(Lesson(row, labels, *_most_likely(loaded, row, labels)))
    return found


@torch.no_grad()
def _most_likely(
    loaded: Loaded, ids: list[int], labels: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    predicted = [at - 1 for at, label in enumerate(labels) if label != IGNORED and at]
    logits = loaded.model(
        input_ids=torch.tensor([ids], device=loaded.device), use_cache=False
    ).logits[0, predicted]
    logprobs, words = logits.float().log_softmax(-1).topk(min(TOP_K, logits.shape[-1]), dim=-1)
    return words.cpu(), logprobs.cpu()


def divergence(
    logits: torch.Tensor, top_ids: torch.Tensor, top_logprobs: torch.Tensor
) -> torch.Tensor:
    """[n] float32: KL(base || prefixed) at each position, over the base's most likely words and
    everything else taken together. logits [n, vocabulary], the others [n, TOP_K].
    """
    mine = logits.float().log_softmax(-1).gather(-1, top_ids)
    theirs = top_logprobs
    rest_of_theirs = (1 - theirs.exp().sum(-1)).clamp_min(1e-6)
    rest_of_mine = (1 - mine.exp().sum(-1)).clamp_min(1e-6)
    return (theirs.exp() * (theirs - mine)).sum(-1) + rest_of_theirs * (
        rest_of_theirs.log() - rest_of_mine.log()
    )


def _write(path: Path, found: list[Lesson]) -> None:
    tensors = {}
    for number, lesson in enumerate(found):
        tensors[f"{number}.ids"] = torch.tensor(lesson.ids)
        tensors[f"{number}.labels"] = torch.tensor(lesson.labels)
        tensors[f"{number}.top_ids"] = lesson.top_ids
        tensors[f"{number}.top_logprobs"] = lesson.top_logprobs
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        unfinished,
        metadata={"lessons": str(len(found))},
    )
    os.replace(unfinished, path)


def _read(path: Path) -> list[Lesson] | None:
    """None when the file is not there or damaged."""
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
        tensors = load_file(path)
        return [
            Lesson(
                tensors[f"{number}.ids"].tolist(),
                tensors[f"{number}.labels"].tolist(),
                tensors[f"{number}.top_ids"],
                tensors[f"{number}.top_logprobs"],
            )
            for number in range(int(told["lessons"]))
        ]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
