"""Whatever shares the batch, a request's greedy tokens are those of plain generation."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from chat.engine import attention
from chat.engine.attention import groups_of
from chat.engine.engine import Engine, EngineConfig
from chat.engine.request import SamplingParams
from tests.support.tiny_models import (
    ARCHITECTURES,
    WINDOW,
    WINDOWED,
    Prefix,
    adapter,
    greedy,
    loaded_model,
    plain_model,
    prefix_tensor,
    random_prompt,
    reference,
)

PREFIXES = (None, Prefix(3, 1), Prefix(9, 2), None, Prefix(17, 3), Prefix(24, 4), Prefix(40, 5))


def mixed_requests(architecture, folder, count, seed):
    draw = random.Random(seed)
    refs = {
        prefix: adapter(architecture, folder, prefix.length, prefix.seed)
        for prefix in PREFIXES
        if prefix
    }
    requests, expected = [], {}
    for number in range(count):
        prefix = PREFIXES[number % len(PREFIXES)]
        prompt, new_tokens = random_prompt(architecture, draw), draw.randint(1, 24)
        request = greedy(
            f"{seed}-{number}", prompt, new_tokens, refs.get(prefix), user=str(number % 3)
        )
        requests.append(request)
        expected[request.id] = (prompt, new_tokens, prefix)
    return requests, expected


def check(architecture, answers, expected):
    for answer in answers:
        assert answer.error is None
        assert answer.token_ids == reference(architecture, *expected[answer.id]), answer.id


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_six_prefixes_and_bare_rows_in_one_batch_equal_plain_generation(
    architecture, compiled, tmp_path
):
    requests, expected = mixed_requests(architecture, tmp_path, 14, seed=1)
    config = EngineConfig(max_rows=7, prefill_tokens=128, compiled=compiled)
    engine = Engine(loaded_model(architecture), config)
    check(architecture, engine.generate(requests), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_static_bucketed_step_equals_the_plain_one(architecture, tmp_path):
    """The path that a GPU captures in graphs, run without capture."""
    from chat.engine.cuda_graphs import StaticDecoder

    requests, expected = mixed_requests(architecture, tmp_path, 7, seed=2)
    engine = Engine(loaded_model(architecture), EngineConfig(max_rows=5, compiled=False))
    engine.decoder = StaticDecoder(engine.loaded, engine.cache, engine.positions, capture=False)
    engine.decoder.buckets = [1, 4, 5]
    check(architecture, engine.generate(requests), expected)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "glm", "gemma3", "mistral"])
def test_rows_attended_in_groups_of_similar_length_equal_plain_generation(
    architecture, tmp_path, monkeypatch, caplog
):
    used = []
    # tiny rows are worth a call of their own now
    monkeypatch.setattr(attention, "CALL_BYTES", 2048)
    monkeypatch.setattr(
        attention, "groups_of", lambda *sizes: used.append(groups_of(*sizes)) or used[-1]
    )
    requests, expected = mixed_requests(architecture, tmp_path, 14, seed=6)
    engine = Engine(
        loaded_model(architecture),
        EngineConfig(max_rows=7, prefill_tokens=128, compiled=False),
    )
    check(architecture, engine.generate(requests), expected)
    assert max(map(len, used)) > 2 and any(
        end - start > 1 for groups in used for start, end, _ in groups
    )
    assert "one by one" not in caplog.text


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(0, 50))
def test_no_other_groups_would_compute_less(widths, call_cost):
    def cost(groups):
        return sum((end - start) * width + call_cost for start, end, width in groups)

    found = groups_of(widths, call_cost)
    rows = [row for start, end, _ in found for row in range(start, end)]
    assert rows == list(range(len(widths)))
    assert all(width == max(widths[start:end]) for start, end, width in found)
    for borders in range(2 ** (len(widths) - 1)):
        cuts = [0, *(row for row in range(1, len(widths)) if borders >> (row - 1) & 1), len(widths)]
        assert cost(found) <= cost([(a, b, max(widths[a:b])) for a, b in pairwise(cuts)])


@pytest.mark.parametrize("chunk", [1, 7, 48])
@pytest.mark.parametrize("architecture", ["qwen2", "glm"])
def test_a_prompt_in_chunks_equals_the_prompt_in_one_piece(architecture, chunk, tmp_path):
    requests, expected = mixed_requests(architecture, tmp_path, 5, seed=3)
    engine = Engine(
        loaded_model(architecture),
        EngineConfig(max_rows=3, prefill_tokens=chunk, reuse_prompts=False),
    )
    check(architecture, engine.generate(requests), expected)


@pytest.mark.parametrize("architecture", WINDOWED)
def test_far_beyond_their_window_logits_are_those_of_the_plain_forward(architecture, tmp_path):
    """A prefix wider than the window, a prompt of many windows in chunks, beside other rows."""
    draw = random.Random(10)
    prefix, ref = Prefix(40, 5), adapter(architecture, tmp_path, 40, 5)
    prompts = [random_prompt(architecture, draw, 8 * WINDOW, 9 * WINDOW) for _ in range(4)]
    engine = Engine(loaded_model(architecture), EngineConfig(max_rows=4, prefill_tokens=100))
    seen = {}
    decode = engine.decoder.run

    def watched(**arguments):
        logits = decode(**arguments)
        rows = engine._batch.decoding_rows
        for row, some in zip(rows, logits, strict=True):
            seen[row.id, len(row.output_ids)] = some
        return logits

    engine.decoder.run = watched
    answers = engine.generate(
        greedy(str(n), prompt, 3 * WINDOW, ref if n % 2 else None)
        for n, prompt in enumerate(prompts)
    )
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tuned = prefix if n % 2 else None
        assert answer.token_ids == reference(architecture, prompt, 3 * WINDOW, tuned)
        ids = torch.tensor([[*prompt, *answer.token_ids[:-1]]])
        past = None
        if tuned:
            past = DynamicCache(
                [(keys[None], values[None]) for keys, values in prefix_tensor(architecture, 40, 5)]
            )
        whole = plain_model(architecture)(ids, past_key_values=past).logits[0, len(prompt) :]
        for at, expected in enumerate(whole, start=1):
            torch.testing.assert_close(seen[str(n), at], expected, rtol=1e-3, atol=1e-3)


def test_a_chatglm_prompt_is_never_cut(tmp_path):
    requests, expected = mixed_requests("chatglm", tmp_path, 4, seed=4)
    engine = Engine(loaded_model("chatglm"), EngineConfig(max_rows=3, prefill_tokens=5))
    check("chatglm", engine.generate(requests), expected)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_a_continued_conversation_reuses_its_keys_and_changes_nothing(
    architecture, with_prefix, tmp_path
):
    draw = random.Random(5)
    prefix = Prefix(9, 2) if with_prefix else None
    ref = adapter(architecture, tmp_path, 9, 2) if with_prefix else None
    engine = Engine(loaded_model(architecture), EngineConfig(max_rows=2))
    prompt = random_prompt(architecture, draw, 30, 40)
    for turn in range(3):
        (answer,) = engine.generate([greedy(f"turn {turn}", prompt, 10, ref)])
        assert answer.token_ids == reference(architecture, prompt, 10, prefix)
        prompt = (*prompt, *answer.token_ids, *random_prompt(architecture, draw, 5, 9))
    assert engine.prompts.hits == 2
    assert engine.prompts.reused_tokens > 60


def test_keys_of_one_adapter_are_not_reused_for_another(tmp_path):
    engine = Engine(loaded_model("qwen2"), EngineConfig(max_rows=2))
    prompt = random_prompt("qwen2", random.Random(6), 30, 40)
    for prefix in (None, Prefix(9, 2), Prefix(3, 1)):
        ref = adapter("qwen2", tmp_path, prefix.length, prefix.seed) if prefix else None
        (answer,) = engine.generate([greedy("one", prompt, 8, ref)])
        assert answer.token_ids == reference("qwen2", prompt, 8, prefix)
    assert engine.prompts.hits == 0


def test_a_prompt_that_is_being_answered_is_not_computed_again(tmp_path):
    """Several answers to one prompt, and a system prompt that others share while it is in use;
    never across adapters.
    """
    draw = random.Random(9)
    engine = Engine(loaded_model("qwen2"), EngineConfig(max_rows=6, prefill_tokens=64))
    prefix, ref = Prefix(9, 2), adapter("qwen2", tmp_path, 9, 2)
    prompt = random_prompt("qwen2", draw, 40, 41)
    other = (*prompt[:30], *random_prompt("qwen2", draw, 12, 13))
    asked = {
        "first": (prompt, 20, None),
        "again": (prompt, 20, None),
        "shares its beginning": (other, 20, None),
        "another adapter": (prompt, 20, prefix),
    }
    answers = {}
    for name, (ids, tokens, tuned) in asked.items():
        request = greedy(name, ids, tokens, ref if tuned else None)
        engine.submit(
            request, lambda event: None, lambda sequence: answers.__setitem__(sequence.id, sequence)
        )
        engine.step()
    while len(answers) < len(asked):
        engine.step()
    for name, (ids, tokens, tuned) in asked.items():
        assert tuple(answers[name].output_ids) == reference("qwen2", ids, tokens, tuned)
    assert (engine.prompts.hits, engine.prompts.reused_tokens) == (2, len(prompt) - 1 + 30)


def schedule(architecture, folder, seed, count):
    """Requests join at random steps, some are aborted midway; the rest must be exact and nothing
    may be left behind.
    """
    draw = random.Random(seed)
    requests, expected = mixed_requests(architecture, folder, count, seed)
    engine = Engine(
        loaded_model(architecture),
        EngineConfig(max_rows=draw.randint(1, 6), prefill_tokens=draw.choice([16, 64, 512])),
    )
    ended = {}
    doomed = {request.id: draw.randint(0, 12) for request in requests if draw.random() < 0.25}
    waiting = list(requests)
    step = 0
    while len(ended) < len(requests):
        while waiting and draw.random() < 0.5:
            engine.submit(
                waiting.pop(),
                lambda event: None,
                lambda sequence: ended.__setitem__(sequence.id, sequence),
            )
        engine.step()
        step += 1
        for identity, at in doomed.items():
            if step >= at:
                engine.abort(identity)
        assert step < 5000
    for sequence in ended.values():
        exact = reference(architecture, *expected[sequence.id])
        if sequence.finish_reason == "abort":
            assert sequence.id in doomed
            assert tuple(sequence.output_ids) == exact[: len(sequence.output_ids)]
        else:
            assert tuple(sequence.output_ids) == exact
    assert engine.idle


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_requests_that_join_leave_and_are_aborted_do_not_disturb_the_others(architecture, tmp_path):
    schedule(architecture, tmp_path, seed=100, count=8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_two_hundred_random_schedules(seed, tmp_path):
    schedule(ARCHITECTURES[seed % len(ARCHITECTURES)], tmp_path, seed=1000 + seed, count=12)


@pytest.mark.parametrize("architecture", ["qwen2", "chatglm"])
def test_seeded_sampling_does_not_depend_on_the_batch(architecture, tmp_path):
    requests, _ = mixed_requests(architecture, tmp_path, 10, seed=7)
    sampling = SamplingParams(
        temperature=1.3, top_p=0.9, top_k=40, repetition_penalty=1.1, max_new_tokens=16
    )
    requests = [
        replace(r, sampling=replace(sampling, seed=number)) for number, r in enumerate(requests)
    ]
    alone = [
        Engine(loaded_model(architecture), EngineConfig(max_rows=1))
        .generate([request])[0]
        .token_ids
        for request in requests
    ]
    together = Engine(loaded_model(architecture), EngineConfig(max_rows=6)).generate(
        requests[::-1]
    )[::-1]
    assert [answer.token_ids for answer in together] == alone
    assert len(set(alone)) == len(alone)


def test_half_precision_differs_only_where_the_best_two_are_close():
    """bfloat16 rounds by batch shape, so a mismatch is allowed where the margin is below 2 % of the
    largest logit.
    """
    import copy

    from chat.engine.loading import from_parts
    from tests.support.tiny_models import byte_tokenizer

    model = copy.deepcopy(plain_model("qwen2")).to(torch.bfloat16)
    loaded = from_parts(model, byte_tokenizer())
    draw = random.Random(8)
    prompts = [random_prompt("qwen2", draw) for _ in range(8)]
    answers = Engine(loaded, EngineConfig(max_rows=8)).generate(
        [greedy(str(i), prompt, 12) for i, prompt in enumerate(prompts)]
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        expected = expected[0, len(prompt) :].tolist()
        for at, (mine, theirs) in enumerate(zip(answer.token_ids, expected, strict=False)):
            if mine != theirs:
                logits = model(torch.tensor([[*prompt, *expected[:at]]])).logits[0, -1].float()
                best = logits.topk(2).values
                assert best[0] - best[1] < 0.02 * logits.abs().max()
                break
