"""The forward of our own: its kernels against torch's, where it is used, and what it leaves to the
ordinary one.
"""

import ctypes
import math
import random
from dataclasses import replace

import pytest
import torch

from chat.engine.engine import Engine, EngineConfig
from chat.engine.flat_forward import flat_forward_for
from chat.ops import cpu_kernels
from tests.support.tiny_models import (
    Prefix,
    adapter,
    byte_tokenizer,
    greedy,
    loaded_model,
    plain_model,
    random_prompt,
    reference,
)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=TOLERANCE, ids=["float32", "bfloat16"])
def kernels(request):
    found = cpu_kernels.load(request.param)
    if found is None:
        pytest.skip("no C++ compiler")
    found.dtype = request.param
    return found


def rotated(x, cosine, sine):
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cosine[:, None] + turned * sine[:, None]


def attended(
    kernels, qkv, cache, rows, columns, prefixes, biases, cosine, sine, kv_heads, dim, threads
):
    """cache: [2, rows, kv_heads, columns, dim], written to; biases [tokens]."""
    count, heads = len(rows), qkv.shape[1] // dim - 2 * kv_heads
    scratch = torch.empty(count * heads * (2 * dim + 2))
    numbers = torch.tensor([rows, columns, [p.shape[3] if p is not None else 0 for p in prefixes],
                            [p.data_ptr() if p is not None else 0 for p in prefixes]])  # fmt: skip
    forward = cpu_kernels.Forward(
        count, heads, kv_heads, dim, threads, *(line.data_ptr() for line in numbers),
        cosine.data_ptr(), sine.data_ptr(), biases.data_ptr(), scratch.data_ptr(),
        scratch.data_ptr() + 4 * count * heads * dim, dim**-0.5,
    )  # fmt: skip
    layer = cpu_kernels.Layer(
        0, cache.stride(1), cache.stride(2), cache[0].data_ptr(), cache[1].data_ptr(), None, None, 0
    )
    out = torch.empty(count, heads * dim, dtype=kernels.dtype)
    kernels.attend(
        ctypes.addressof(forward), ctypes.addressof(layer), qkv.data_ptr(), out.data_ptr()
    )
    return out


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("dim", [8, 64, 80, 128])
def test_attention_is_torchs_over_prefix_and_own_columns(kernels, dim, heads, kv_heads, threads):
    torch.manual_seed(dim + heads)
    dtype = kernels.dtype
    cache = torch.randn(2, 5, kv_heads, 200, dim).to(dtype)
    shared = torch.randn(1, 2, kv_heads, 150, dim).to(dtype)
    other = torch.randn(1, 2, kv_heads, 3, dim).to(dtype)
    # a prompt of 70 tokens, three single tokens (two of them behind one prefix), a chunk of 5
    plan = [(0, 10, 70, None), (1, 0, 1, shared), (4, 130, 1, shared), (3, 63, 1, None),
            (2, 40, 5, other)]  # fmt: skip
    rows = [row for row, _, count, _ in plan for _ in range(count)]
    columns = [first + i for _, first, count, _ in plan for i in range(count)]
    prefixes = [prefix for _, _, count, prefix in plan for _ in range(count)]
    angle = torch.rand(len(rows), dim // 2).repeat(1, 2) * 6
    cosine, sine = angle.cos(), angle.sin()
    qkv = torch.randn(len(rows), (heads + 2 * kv_heads) * dim).to(dtype)
    # the second row of the shared prefix feels it half as strongly, the third's half as much again
    biases = torch.tensor([{4: math.log(0.5), 2: math.log(1.5)}.get(row, 0.0) for row in rows])
    out = attended(
        kernels, qkv, cache, rows, columns, prefixes, biases, cosine, sine, kv_heads, dim, threads
    )

    parts = qkv.float().view(len(rows), -1, dim)
    query, key = (
        rotated(parts[:, a:b], cosine, sine) for a, b in ((0, heads), (heads, heads + kv_heads))
    )
    for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
        assert torch.allclose(cache[0, row, :, column].float(), key[i], atol=TOLERANCE[dtype] * 4)
        keys, values = cache[:, row, :, : column + 1].float()
        if prefixes[i] is not None:
            keys = torch.cat([prefixes[i][0, 0].float(), keys], 1)
            values = torch.cat([prefixes[i][0, 1].float(), values], 1)
        mask = torch.zeros(1, keys.shape[1])
        mask[:, : keys.shape[1] - column - 1] = biases[i]
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[i, :, None], keys, values, mask, enable_gqa=True
        )
        assert torch.allclose(
            out[i].float(), expected.flatten(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        ), (i, row, column)


@pytest.mark.parametrize("width", [5, 16, 100])
def test_normalisation_and_gate_are_torchs(kernels, width):
    torch.manual_seed(width)
    dtype, tolerance = kernels.dtype, TOLERANCE[kernels.dtype]
    residual, weight = torch.randn(3, width) * 3, torch.rand(width)
    change = torch.randn(3, width).to(dtype)
    expected = residual + change.float()
    out = torch.empty(3, width, dtype=dtype)
    kernels.normalise(
        3, width, 1e-5, 1,
        residual.data_ptr(), change.data_ptr(), weight.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    assert torch.allclose(residual, expected)
    normal = torch.nn.functional.rms_norm(expected, (width,), weight, 1e-5)
    assert torch.allclose(out.float(), normal, atol=tolerance, rtol=tolerance)

    both = (torch.randn(3, 2 * width) * 30).to(dtype)
    kernels.gate(3, width, 1, both.data_ptr(), out.data_ptr())
    gate, up = both.float().chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    assert torch.allclose(out.float(), expected, atol=tolerance, rtol=tolerance)


def test_it_is_used_where_it_fits_and_only_there(monkeypatch):
    if cpu_kernels.load(torch.float32) is None:
        pytest.skip("no C++ compiler")
    assert flat_forward_for(loaded_model("qwen3")) is not None
    assert flat_forward_for(loaded_model("glm")) is None
    assert flat_forward_for(loaded_model("chatglm")) is None


@pytest.fixture
def fresh():
    """A model of its own, which no other test has asked for its forward."""
    import copy

    from chat.engine.loading import from_parts

    return from_parts(copy.deepcopy(plain_model("llama")), byte_tokenizer())


def test_a_model_that_computes_something_else_keeps_its_own_forward(fresh):
    layer = fresh.model.model.layers[1].input_layernorm
    plain = layer.forward
    layer.forward = lambda states: 1.5 * plain(states)  # as a class of that name might, one day
    assert flat_forward_for(fresh) is None


def test_without_a_compiler_answers_are_the_same(fresh, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "load", lambda dtype: None)
    assert flat_forward_for(fresh) is None
    prompt = random_prompt("llama", random.Random(3))
    (answer,) = Engine(fresh, EngineConfig(max_rows=2)).generate([greedy("1", prompt, 8)])
    assert answer.token_ids == reference("llama", prompt, 8, None)


def test_a_compiler_that_fails_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/bin/false")
    cpu_kernels._library.cache_clear()
    try:
        assert cpu_kernels.load(torch.float32) is None
    finally:
        monkeypatch.undo()
        cpu_kernels._library.cache_clear()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_guessed_tokens_change_no_greedy_answer(architecture, rows, tmp_path):
    draw = random.Random(rows)
    ref = adapter(architecture, tmp_path, 9, 2)
    engine = Engine(loaded_model(architecture), EngineConfig(max_rows=rows))
    requests, expected = [], {}
    for number in range(6):
        prompt = random_prompt(architecture, draw) * 3
        prefix = Prefix(9, 2) if number % 2 else None
        requests.append(greedy(str(number), prompt, 40, ref if prefix else None))
        expected[str(number)] = reference(architecture, prompt, 40, prefix)
    answers = engine.generate(requests)
    assert {answer.id: answer.token_ids for answer in answers} == expected
    tokens = sum(len(answer.token_ids) for answer in answers)
    if cpu_kernels.load(torch.float32) is not None and rows == 1:
        assert engine.status()["steps"] < 0.95 * tokens  # such models repeat themselves
    assert all(answer.usage["completion_tokens"] == len(answer.token_ids) for answer in answers)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_text_that_the_answer_resembles_saves_steps_and_changes_nothing(rows, monkeypatch):
    if cpu_kernels.load(torch.float32) is None:
        pytest.skip("no C++ compiler")
    draw, prompter = random.Random(4), loaded_model("qwen3").prompter
    known, requests, expected = {}, [], {}
    for number in range(8):
        prompt = random_prompt("qwen3", draw)
        expected[str(number)] = reference("qwen3", prompt, 32, None)
        told = list(expected[str(number)])
        told[20] = 5 if told[20] != 5 else 6  # and then differs
        known[f"text {number}"] = [*told, 0]
        requests.append(replace(greedy(str(number), prompt, 32, None), resembles=f"text {number}"))
    monkeypatch.setattr(prompter, "response_ids", known.__getitem__)
    engine = Engine(loaded_model("qwen3"), EngineConfig(max_rows=rows))
    answers = engine.generate(requests)
    assert {answer.id: answer.token_ids for answer in answers} == expected
    assert engine.status()["steps"] < 0.6 * 8 * 32 / rows


def test_sampled_rows_beside_guessed_ones_draw_as_they_do_alone():
    draw = random.Random(6)
    prompts = [random_prompt("llama", draw) * 3 for _ in range(4)]
    requests = [greedy(str(number), prompt, 30) for number, prompt in enumerate(prompts)]
    for number in (1, 3):
        sampling = replace(requests[number].sampling, do_sample=True, temperature=0.8, seed=number)
        requests[number] = replace(requests[number], sampling=sampling)
    together = Engine(loaded_model("llama"), EngineConfig(max_rows=4)).generate(requests)
    for request, answer in zip(requests, together, strict=True):
        config = EngineConfig(max_rows=1, drafts=False, compiled=False)
        (alone,) = Engine(loaded_model("llama"), config).generate([request])
        assert alone.token_ids == answer.token_ids


def test_rows_of_one_adapter_read_one_copy_of_its_prefix(tmp_path):
    if cpu_kernels.load(torch.float32) is None:
        pytest.skip("no C++ compiler")
    draw, prefix = random.Random(8), Prefix(40, 5)
    ref = adapter("qwen2", tmp_path, prefix.length, prefix.seed)
    prompts = [random_prompt("qwen2", draw) for _ in range(6)]
    engine = Engine(loaded_model("qwen2"), EngineConfig(max_rows=6))
    ends, lengths = [], []
    for number, prompt in enumerate(prompts):
        engine.submit(greedy(str(number), prompt, 6, ref), lambda event: None, ends.append)
    while not engine.idle:
        engine.step()
        rows = engine._batch.decoding_rows
        assert len({row.shared_prefix.data_ptr() for row in rows}) <= 1
        lengths += [row.kv_length - len(row.prompt) for row in rows]
    assert max(lengths) < 6  # columns of the cache: prompt and answer, and nothing else
    for sequence in ends:
        expected = reference("qwen2", tuple(sequence.prompt), 6, prefix)
        assert tuple(sequence.output_ids) == expected
