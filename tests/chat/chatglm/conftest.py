"""The tiny model with reference weights, and the reference arrays."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import chat.chatglm  # noqa: F401  registers the Auto classes
from tests.support.tiny_chatglm import DATA, tiny_folder


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("chatglm") / "tiny")


@pytest.fixture(scope="session")
def model(folder):
    """Shared: do not change it."""
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


class Case:
    """One recorded case: its inputs as tensors by attribute, everything else by item as an
    array.
    """

    def __init__(self, name):
        self.arrays = np.load(DATA / f"{name}.npz")
        self.inputs = {
            key: torch.from_numpy(self.arrays[key])
            for key in ("input_ids", "attention_mask", "position_ids")
        }

    @property
    def ids(self):
        return self.inputs["input_ids"]

    def __getitem__(self, key):
        return self.arrays[key]


@pytest.fixture(scope="session")
def case():
    return Case
