"""What people may write as a source, and which files of a model are needed."""

import os

import pytest

from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.sources import HubRepository, LocalPath, PackagedModel, parse_source
from chat.checkpoints.fetch.wanted import needed_files


def test_sources_are_told_apart(tmp_path):
    assert isinstance(parse_source(" SmolLM2-135M-Instruct "), PackagedModel)
    assert parse_source("hf:Qwen/Qwen3-0.6B") == HubRepository("hf", "Qwen/Qwen3-0.6B")
    assert parse_source("modelscope:ZhipuAI/chatglm-6b@v1.1.0") == HubRepository(
        "modelscope", "ZhipuAI/chatglm-6b", "", "v1.1.0"
    )
    packed = parse_source("hf:org/name-GGUF/model.Q4_K_M.gguf@main")
    assert packed == HubRepository("hf", "org/name-GGUF", "model.Q4_K_M.gguf", "main")
    assert packed.name == "model.q4_k_m"
    (tmp_path / "m.GGUF").write_bytes(b"GGUF")
    (tmp_path / "m.tar.gz").write_bytes(b"")
    assert parse_source(str(tmp_path)) == LocalPath("folder", tmp_path)
    assert parse_source(f"{tmp_path}/m.GGUF").kind == "gguf"
    assert parse_source(f"{tmp_path}/m.tar.gz").kind == "archive"
    assert parse_source(f"{tmp_path}/m.tar.gz").name == "m"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "source_missing"),
        ("smollm3", "unknown_model"),
        ("hf:", "bad_repository"),
        ("hf:justaname", "bad_repository"),
        ("hf:../../etc", "bad_repository"),
        ("hf:a/b@../../x", "bad_repository"),
        ("modelscope:a/b c", "bad_repository"),
        ("/does/not/exist", "path_missing"),
        ("./nothing.gguf", "path_missing"),
        ("/tmp/\0", "path_missing"),
        ("/" + "a/" * 3000, "path_missing"),
        ("/dev/zero", "path_missing"),
        (__file__, "unknown_file"),
    ],
)
def test_what_is_no_source_is_refused_by_name(text, code):
    with pytest.raises(FetchFailed) as caught:
        parse_source(text)
    assert caught.value.code == code


def test_a_pipe_is_no_source(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(FetchFailed) as caught:
        parse_source(str(tmp_path / "model.gguf"))
    assert caught.value.code == "path_missing"


BASE = {"config.json": 1, "tokenizer.json": 1, "generation_config.json": 1}


def test_only_what_is_needed_is_wanted():
    sizes = {
        **BASE,
        "model-00001-of-00002.safetensors": 9,
        "model-00002-of-00002.safetensors": 9,
        "model.safetensors.index.json": 1,
        "pytorch_model.bin": 18,
        "consolidated.safetensors": 18,
        "modeling_custom.py": 1,
        "README.md": 1,
        "LICENSE": 1,
        "license.py": 1,
        "image.png": 1,
        "model.onnx": 1,
    }
    assert set(needed_files(sizes)) == {
        *BASE,
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "LICENSE",
    }


def test_pickle_is_taken_only_without_safetensors():
    bins = {"pytorch_model-00001-of-00001.bin": 9, "pytorch_model.bin.index.json": 1}
    assert set(bins) <= set(needed_files({**BASE, **bins}))
    both = needed_files({**BASE, **bins, "model.safetensors": 9})
    assert "model.safetensors" in both and not set(bins) & set(both)


@pytest.mark.parametrize(
    ("sizes", "code"),
    [
        (BASE, "no_weights"),
        ({"model.safetensors": 1, "tokenizer.json": 1}, "no_config"),
        ({"model.safetensors": 1, "config.json": 1}, "no_tokenizer"),
        ({**BASE, "model-00002-of-00002.safetensors": 1}, "parts_missing"),
        ({**BASE, "model.safetensors": 1, "tokenizer.json": 1 << 40}, "file_too_large"),
        ({"a.gguf": 1, "b.gguf": 1}, "several_gguf"),
    ],
)
def test_what_makes_no_checkpoint_is_said_before_anything_is_fetched(sizes, code):
    with pytest.raises(FetchFailed) as caught:
        needed_files(sizes)
    assert caught.value.code == code
