"""A family of models is one object; whoever must know the family asks it."""

import subprocess
import sys

import pytest

from chat.checkpoints.describe import describe
from chat.engine.families import FAMILIES, family_named, family_of
from tests.support.tiny_chatglm import tiny_folder
from tests.support.tiny_models import ARCHITECTURES, loaded_model

FAMILY = {architecture: "causal" for architecture in ARCHITECTURES} | {"chatglm": "chatglm"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_its_family(architecture):
    loaded = loaded_model(architecture)
    assert loaded.family is family_named(FAMILY[architecture])
    assert loaded.shifts_positions == (not loaded.family.bidirectional_prompt)
    assert family_of(loaded.model.config.to_dict()) is loaded.family


def test_every_family_has_a_tiny_model():
    assert {family.name for family in FAMILIES} == set(FAMILY.values())


def test_the_description_names_the_family(tmp_path):
    assert describe(tiny_folder(tmp_path / "chatglm"))["family"] == "chatglm"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "chatglm", "inner_hidden_size": 64}, "chatglm"),
        # ChatGLM2 and 3: the same model_type over another architecture
        ({"model_type": "chatglm", "inner_hidden_size": 64, "ffn_hidden_size": 64}, None),
        ({"model_type": "chatglm", "ffn_hidden_size": 64}, None),
        ({"model_type": "qwen2"}, "causal"),
        ({"model_type": "bert_of_tomorrow"}, None),
        ({}, None),
    ],
)
def test_a_folder_is_recognised_by_its_configuration(config, name):
    family = family_of(config)
    assert (family and family.name) == name


def test_a_row_without_a_description_is_an_ordinary_model():
    assert family_named(None).name == family_named("unknown").name == "causal"


def test_the_web_tier_may_ask():
    code = (
        "import sys, chat.engine.families, chat.checkpoints.describe, "
        "chat.checkpoints.adapter_files; "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
