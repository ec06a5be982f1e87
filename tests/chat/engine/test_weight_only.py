"""Packed weights: the engine answers as transformers does with the same packed modules, and they
take the memory that they should.
"""

import pytest
import torch

from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import load
from chat.engine.request import Request, SamplingParams
from chat.ops import weight_only
from tests.support import tiny_training

SHAPE = {"hidden_size": 64, "intermediate_size": 128}
BITS = {"int8": 8, "int4": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_training.write(tmp_path_factory.mktemp("packed") / "model", **SHAPE)


def held(model) -> int:
    """Bytes of all packed weights, scales and zero points included."""
    return sum(
        buffer.nbytes
        for module in model.modules()
        if isinstance(module, weight_only.Int8Linear | weight_only.Int4Linear)
        for buffer in module.buffers()
    )


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_greedy_answers_equal_transformers_with_the_same_packed_modules(folder, precision):
    loaded = load(folder, device="cpu", precision=precision)
    reference = load(folder, device="cpu", precision=precision).model  # no engine has touched it
    engine = Engine(loaded, EngineConfig(max_rows=4, max_length=128))
    prompts = [tuple(range(5, 5 + length)) for length in (3, 9, 17)]
    sampling = SamplingParams(do_sample=False, max_new_tokens=16)
    answers = engine.generate(
        [Request(str(i), prompt_ids=ids, sampling=sampling) for i, ids in enumerate(prompts)]
    )
    for ids, answer in zip(prompts, answers, strict=True):
        assert answer.error is None
        tokens = list(ids)
        for token in answer.token_ids:
            with torch.inference_mode():
                logits = reference(torch.tensor([tokens])).logits[0, -1].float()
            best = logits.topk(2).values
            # bfloat16 rounds by the batch's shape: a tie may fall the other way
            close = float(best[0] - logits[token]) <= 0.02 * float(logits.abs().max())
            assert token == int(logits.argmax()) or (precision == "int4" and close)
            tokens.append(token)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_packed_weights_take_the_memory_that_they_should(folder, precision):
    plain, packed = (
        load(folder, device="cpu").model,
        load(folder, device="cpu", precision=precision),
    )
    linear = [
        module
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    numbers = sum(layer.weight.numel() for layer in linear)
    least = numbers * BITS[precision] // 8
    assert least < held(packed.model) < 1.6 * least  # scales weigh much in rows of 64
    assert type(packed.model.lm_head).__name__ in ("Linear", "OneDNNLinear")


def test_a_packed_model_answers_otherwise_than_the_plain_one(folder):
    """Or nothing has been packed."""
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        plain = load(folder, device="cpu").model(ids).logits
        packed = load(folder, device="cpu", precision="int8").model(ids).logits
    assert 0 < float((plain - packed).abs().max()) < 0.2 * float(plain.abs().max())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_packed_layer_is_as_near_as_its_steps_are_small(precision):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 96).requires_grad_(False)
    inputs = torch.randn(3, 5, 64)
    kind = weight_only.Int8Linear if precision == "int8" else weight_only.Int4Linear
    error = kind(layer)(inputs) - layer(inputs)
    step = {"int8": 2 * 0.125 / 254, "int4": 0.25 / 15}[precision]  # weights lie within 1/8
    # rounding errors of half a step at most, in 64 products of inputs about 1
    assert 0 < float(error.std()) < step * 8 / 12**0.5 * 1.5
