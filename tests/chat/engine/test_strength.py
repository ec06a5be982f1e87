"""How strongly a prefix acts, per request: log-lambda on the mask's prefix columns."""

import math
import random
from dataclasses import replace

import pytest
import torch

from chat.engine import adapters
from chat.engine.cuda_graphs import StaticDecoder
from chat.engine.engine import Engine, EngineConfig
from chat.engine.request import AdapterRef, RequestRefused
from tests.support.tiny_models import (
    ARCHITECTURES,
    adapter,
    greedy,
    loaded_model,
    prefix_tensor,
    random_prompt,
)
from tuning.ptuning.prefix import TrainingPrefixCache

LENGTH, SEED, NEW = 9, 2, 8


def asked(id, prompt, ref, strength=None):
    request = greedy(id, prompt, NEW, ref)
    changes = {"logprobs": 5} | ({} if strength is None else {"prefix_strength": strength})
    return replace(request, sampling=replace(request.sampling, **changes))


def answers(architecture, requests, static=False, **config):
    """[(tokens, [five log-probabilities of each])] in the order of the requests."""
    seen = {request.id: [] for request in requests}
    config = {"max_rows": 4, "compiled": not static, **config}
    engine = Engine(loaded_model(architecture), EngineConfig(**config))
    if static:
        engine.decoder = StaticDecoder(engine.loaded, engine.cache, engine.positions, capture=False)

    def sink(event):
        for entry in event.data.get("logprobs") or ():
            seen[event.id].append(
                [entry["logprob"], *(t["logprob"] for t in entry["top_logprobs"])]
            )

    ends = {}
    for request in requests:
        engine.submit(request, sink, lambda sequence: ends.__setitem__(sequence.id, sequence))
    while not engine.idle:
        engine.step()
    assert all(sequence.error is None for sequence in ends.values())
    return [(tuple(ends[r.id].output_ids), seen[r.id]) for r in requests]


def close(ours, theirs):
    assert ours[0] == theirs[0]
    torch.testing.assert_close(torch.tensor(ours[1]), torch.tensor(theirs[1]), rtol=0, atol=1e-4)


@pytest.fixture
def prompt():
    return lambda architecture, seed=3: random_prompt(architecture, random.Random(seed), 20, 30)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_is_as_trained_nothing_is_the_base_and_almost_nothing_almost(
    architecture, tmp_path, prompt
):
    ref, text = adapter(architecture, tmp_path, LENGTH, SEED), prompt(architecture)
    trained, one = (
        answers(architecture, [asked("a", text, ref, strength)])[0] for strength in (None, 1.0)
    )
    base, none, hardly = (
        answers(architecture, [asked("a", text, to, strength)])[0]
        for to, strength in ((None, None), (ref, 0), (ref, 1e-9))
    )
    assert one == trained  # bit for bit
    assert none == base
    close(hardly, base)
    assert trained != base


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_the_weight_of_each_prefix_column_is_multiplied(strength, compiled, tmp_path, prompt):
    """Against the model's own forward with a mask written out by hand."""
    text, ref = prompt("qwen2"), adapter("qwen2", tmp_path, LENGTH, SEED)
    loaded = loaded_model("qwen2")
    tokens, logprobs = answers("qwen2", [asked("a", text, ref, strength)], compiled=compiled)[0]
    ids = [*text, *tokens[:-1]]
    total = LENGTH + len(ids)
    mask = torch.full((len(ids), total), torch.finfo(torch.float32).min).triu(LENGTH + 1)
    mask[:, :LENGTH] = math.log(strength)
    with torch.no_grad():
        logits = loaded.model(
            input_ids=torch.tensor([ids]),
            position_ids=torch.arange(LENGTH, total)[None],
            attention_mask=mask[None, None],
            past_key_values=TrainingPrefixCache(prefix_tensor("qwen2", LENGTH, SEED), 1),
        ).logits[0, len(text) - 1 :]
    assert tuple(logits.argmax(-1).tolist()) == tokens
    best = logits.log_softmax(-1).max(-1).values
    torch.testing.assert_close(
        torch.tensor([each[0] for each in logprobs]), best, rtol=0, atol=1e-4
    )


def test_twice_as_strong_is_the_prefix_written_twice(tmp_path, prompt):
    """Where a prefix moves no positions (ChatGLM), that can be seen at once."""
    text, ref = prompt("chatglm"), adapter("chatglm", tmp_path / "once", LENGTH, SEED)
    once = adapters.load(ref.folder)
    folder = tmp_path / "twice"
    twice = AdapterRef(
        adapters.save(replace(once, tensor=once.tensor.repeat(1, 1, 1, 2, 1)), folder), str(folder)
    )
    close(
        answers("chatglm", [asked("a", text, ref, 2.0)])[0],
        answers("chatglm", [asked("a", text, twice)])[0],
    )


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("architecture", ["qwen2", "chatglm"])
def test_each_row_of_a_batch_has_its_own_strength(architecture, static, tmp_path, prompt):
    ref = adapter(architecture, tmp_path, LENGTH, SEED)
    requests = [
        asked(str(number), prompt(architecture, number), to, strength)
        for number, (to, strength) in enumerate(
            ((ref, 0.2), (ref, None), (None, None), (ref, 1.7), (ref, 0))
        )
    ]
    together = answers(architecture, requests, static=static)
    for request, found in zip(requests, together, strict=True):
        close(found, answers(architecture, [request])[0])


def test_a_prompt_computed_at_one_strength_is_not_reused_at_another(tmp_path, prompt):
    text, ref = prompt("qwen2"), adapter("qwen2", tmp_path, LENGTH, SEED)
    engine = Engine(loaded_model("qwen2"), EngineConfig(max_rows=2))
    strengths = (1.0, 0.5, 2.0, 0)
    for strength in strengths:
        (answer,) = engine.generate([asked(f"at {strength}", text, ref, strength)])
        assert answer.token_ids == answers("qwen2", [asked("a", text, ref, strength)])[0][0]
    assert engine.prompts.hits == 0
    engine.generate([asked(f"again {strength}", text, ref, strength) for strength in strengths])
    assert engine.prompts.hits == 4


@pytest.mark.parametrize("strength", [-0.1, 2.1, math.nan])
def test_out_of_range_is_refused(strength, tmp_path, prompt):
    engine = Engine(loaded_model("qwen2"), EngineConfig(max_rows=2))
    ref = adapter("qwen2", tmp_path, LENGTH, SEED)
    with pytest.raises(RequestRefused, match="prefix_strength") as refusal:
        engine.submit(asked("a", prompt("qwen2"), ref, strength), lambda event: None)
    assert refusal.value.param == "prefix_strength"
