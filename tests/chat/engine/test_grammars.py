"""Answers that must be JSON of a given shape."""

import json

import jsonschema
import pytest

from chat.engine.engine import Engine, EngineConfig
from chat.engine.request import Request, SamplingParams
from tests.support.tiny_models import greedy, loaded_model

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"enum": ["小", "中", "大"]},
        "prices": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "size", "prices"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("architecture", ["qwen2", "chatglm"])
def test_every_answer_satisfies_the_schema_in_a_batch_with_others(architecture):
    """The model is random: nothing but the grammar makes it write JSON. An answer without one is
    as it is alone.
    """
    engine = Engine(loaded_model(architecture), EngineConfig(max_rows=3))
    said = ({"role": "user", "content": "裙子"},)
    shaped = [
        Request(
            str(seed),
            said,
            sampling=SamplingParams(
                json_schema=json.dumps(SCHEMA), seed=seed, temperature=1.5, max_new_tokens=200
            ),
        )
        for seed in range(3)
    ]
    free = Request("free", said, sampling=SamplingParams(do_sample=False, max_new_tokens=30))
    *answers, mixed = engine.generate([*shaped, free])
    (alone,) = engine.generate([free])
    for answer in answers:
        assert answer.finish_reason == "stop", answer
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert mixed.token_ids == alone.token_ids


@pytest.mark.parametrize(
    "schema", ["not json", '"x"', '{"type": "nonsense"}', '{"$ref": "#/nowhere"}', "7"]
)
def test_what_is_no_schema_is_refused_by_the_parameters_name(schema):
    engine = Engine(loaded_model("qwen2"), EngineConfig(max_rows=1))
    wish = Request(
        "1", ({"role": "user", "content": "x"},), sampling=SamplingParams(json_schema=schema)
    )
    (answer,) = engine.generate([wish])
    assert (answer.error["code"], answer.error["param"]) == ("invalid_value", "response_format")


def test_a_text_is_gone_on_with_as_its_tokens_are():
    loaded = loaded_model("qwen2")
    engine = Engine(loaded, EngineConfig(max_rows=1))
    ids = tuple(loaded.tokenizer.encode("裙子很", add_special_tokens=False))
    sampling = SamplingParams(do_sample=False, max_new_tokens=8)
    told, plain = engine.generate(
        [Request("1", text="裙子很", sampling=sampling), greedy("2", ids, 8)]
    )
    assert told.token_ids == plain.token_ids
