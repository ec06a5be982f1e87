"""Estimates of memory against what a real process takes."""

import subprocess
import sys

import pytest

from chat.checkpoints.describe import describe
from chat.checkpoints.memory import PROGRAM, Machine, estimates, machine
from tests.support.folders import checkpoint_folder

DESCRIPTION = {
    "parameters": 1_000_000,
    "layers": 4,
    "hidden_size": 100,
    "intermediate_size": 400,
    "kv_heads": 2,
    "head_dim": 25,
    "vocabulary": 1000,
    "context_length": 2048,
}


def by_use(description, memory=1 << 40):
    found = estimates(description, Machine("cpu", memory))
    return {(one.use, one.precision): one for one in found}


def test_every_figure_is_the_sum_of_terms_that_can_be_reckoned_again():
    for estimate in by_use(DESCRIPTION).values():
        assert estimate.bytes == sum(term.bytes for term in estimate.terms)
        for term in estimate.terms:
            text = term.arithmetic.replace(",", "").replace("×", "*").replace(" B", "")
            assert term.name == "program" or abs(eval(text) - term.bytes) <= 1, text


def test_chat_holds_weights_and_the_cache_of_one_conversation():
    terms = {term.name: term.bytes for term in by_use(DESCRIPTION)["chat", "bfloat16"].terms}
    assert terms == {
        "weights": 2_000_000,
        "cache": 2 * 4 * 2 * 25 * 2 * 2048,
        "program": PROGRAM,
    }


def test_what_a_load_took_takes_the_place_of_weights_and_program():
    before = by_use(DESCRIPTION)
    measured = {"precision": "float32", "device": "cpu", "bytes": 777}
    after = by_use({**DESCRIPTION, "measured": measured})
    assert after["chat", "float32"].terms[0].bytes == 777
    cache = next(term for term in before["chat", "float32"].terms if term.name == "cache")
    assert after["chat", "float32"].bytes == 777 + cache.bytes
    assert after["chat", "bfloat16"] == before["chat", "bfloat16"]
    elsewhere = {**measured, "device": "cuda"}
    assert by_use({**DESCRIPTION, "measured": elsewhere}) == before


def test_less_precision_is_less_memory_and_training_is_more_than_chat():
    found = {key: one.bytes for key, one in by_use(DESCRIPTION).items()}
    for use in ("chat", "ptuning"):
        sizes = [found[use, precision] for precision in ("float32", "bfloat16", "int8", "int4")]
        assert sizes == sorted(sizes, reverse=True)
    assert found["chat", "float32"] < found["full", "float32"]
    assert ("full", "int4") not in found


def test_what_does_not_fit_says_so():
    fits = {
        key: one.fits for key, one in by_use({**DESCRIPTION, "parameters": 10**9}, 3 << 30).items()
    }
    assert fits["chat", "bfloat16"] and not fits["chat", "float32"] and not fits["full", "bfloat16"]


@pytest.mark.parametrize("value", [None, "x", -1, 0, 1e300, 1 << 80])
def test_a_description_that_says_too_little_makes_no_estimate(value):
    for name in ("parameters", "layers", "kv_heads"):
        assert estimates({**DESCRIPTION, name: value}, Machine("cpu", 1)) == []


def test_a_real_folder_has_estimates(tmp_path):
    assert len(estimates(describe(checkpoint_folder(tmp_path / "c")))) == 10
    assert machine().bytes > 1 << 20


@pytest.mark.slow
def test_the_program_takes_about_what_is_assumed():
    code = (
        "import psutil, chat.engine.engine, transformers, torch;"
        "torch.ones(64, 64) @ torch.ones(64, 64);"
        "print(psutil.Process().memory_info().rss)"
    )
    took = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert 0.5 * PROGRAM < took < 2.5 * PROGRAM
