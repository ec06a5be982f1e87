"""The tiny model with reference weights, and the reference arrays."""

import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import chat.chatglm  # noqa: F401  registers the Auto classes
from tests.chat.chatglm.tiny import DATA, tiny_folder


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


def golden_folder():
    """Reference files that may not be in this repository; the folder is named by CHATGLM_GOLDEN."""
    folder = os.environ.get("CHATGLM_GOLDEN")
    if not folder:
        pytest.skip("CHATGLM_GOLDEN names no folder with the reference files")
    return folder


def vocabulary_folder():
    """The published vocabulary and its tokenizer_config.json; the folder is named by
    CHATGLM_VOCABULARY.
    """
    folder = os.environ.get("CHATGLM_VOCABULARY")
    if not folder:
        pytest.skip("CHATGLM_VOCABULARY names no folder with the published vocabulary")
    return folder
