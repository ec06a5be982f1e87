"""What a prefix costs of general ability: the same general questions with the prefix on and off,
and how much likelier or less likely it makes ordinary answers. No Django.

The most common complaint about P-tuning v2 is that a tuned model "only answers from the dataset";
a score on that dataset alone cannot show it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from chat.engine.engine import Engine
from chat.engine.loading import Loaded
from chat.engine.request import AdapterRef
from chat.remote_engine import RemoteEngine
from evaluation.general_questions import QUESTIONS
from evaluation.likelihood import losses
from evaluation.predict import predict
from tuning.datasets.examples import messages_of

SOURCE, TARGET = 64, 48  # tokens; the questions are short, and so are their answers

AnyEngine = Engine | RemoteEngine


def card(
    engine: AnyEngine,
    adapter: AdapterRef,
    prefix: torch.Tensor | None,
    *,
    kept_as: str,
    folder: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """{"questions", "base_right", "right", "kept", "loss", "answers"}, or None when it was stopped.

    base_right, right: questions that prefix off and on answer rightly; kept: both. loss: {"base",
    "tuned"} in nats per token over the questions' written answers, None where the model is not in
    this process. answers: [{"prompt", "base", "text", "base_right", "right"}].

    `kept_as` names the weights: what the base says of the same weights is read from `folder`.
    """
    base = _base_answers(engine, kept_as, folder, should_stop)
    tuned = None if base is None else _answers(engine, adapter, should_stop)
    if base is None or tuned is None:
        return None
    answers = [
        {
            "prompt": question.prompt,
            "base": before,
            "text": after,
            "base_right": question.is_answered_by(before),
            "right": question.is_answered_by(after),
        }
        for question, before, after in zip(QUESTIONS, base, tuned, strict=True)
    ]
    return {
        "questions": len(answers),
        "base_right": sum(answer["base_right"] for answer in answers),
        "right": sum(answer["right"] for answer in answers),
        "kept": sum(answer["base_right"] and answer["right"] for answer in answers),
        "loss": _losses(engine, prefix),
        "answers": answers,
    }


def _answers(
    engine: AnyEngine, adapter: AdapterRef | None, should_stop: Callable[[], bool]
) -> list[str] | None:
    """One text a question, greedy; None when stopped on the way."""
    asked = [(number, messages_of(each.prompt)) for number, each in enumerate(QUESTIONS)]
    found = {
        answer.row: answer.text.strip()
        for answer in predict(
            engine,
            asked,
            adapter=adapter,
            max_source_length=SOURCE,
            max_target_length=TARGET,
            should_stop=should_stop,
        )
    }
    return [found[number] for number, _ in asked] if len(found) == len(asked) else None


def _base_answers(
    engine: AnyEngine, kept_as: str, folder: Path, should_stop: Callable[[], bool]
) -> list[str] | None:
    asked = json.dumps([kept_as, SOURCE, TARGET, *(each.prompt for each in QUESTIONS)])
    path = folder / f"answers-{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if len(known) == len(QUESTIONS) and all(isinstance(text, str) for text in known):
            return known
    except (OSError, ValueError, TypeError):
        pass  # not asked yet, or damaged: asked again
    answers = _answers(engine, None, should_stop)
    if answers is not None:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(answers, ensure_ascii=False), encoding="utf-8")
        os.replace(unfinished, path)
    return answers


def _losses(engine: AnyEngine, prefix: torch.Tensor | None) -> dict[str, float] | None:
    if not isinstance(engine, Engine) or prefix is None:
        return None
    loaded = engine.loaded
    return {
        "base": round(_loss(loaded, None), 4),
        "tuned": round(_loss(loaded, prefix), 4),
    }


def _loss(loaded: Loaded, prefix: torch.Tensor | None) -> float:
    rows = [
        loaded.prompter.training_ids(messages_of(each.prompt), each.answer, SOURCE, TARGET)
        for each in QUESTIONS
    ]
    found = losses(loaded, rows, prefix)
    return sum(nats for nats, _ in found) / max(1, sum(tokens for _, tokens in found))
