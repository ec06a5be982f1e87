"""Prefix folders of upstream's scripts and of peft, in and out."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from peft.tuners.cartridge.utils import compose_cartridge_adapters
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from chat.checkpoints import adapter_files
from chat.checkpoints.foreign_adapters import (
    BaseShape,
    flatten,
    read_prefix,
    write_original,
    write_peft,
)
from chat.engine import adapters
from chat.engine.adapters import AdapterInvalid, KVPrefix
from tests.support.tiny_chatglm import DATA, tiny_folder, write_shards

TINY = BaseShape(layers=4, kv_heads=4, head_dim=16)
KEY = "transformer.prefix_encoder.embedding.weight"


@pytest.fixture
def golden_prefix():
    arrays = np.load(DATA / "prefix_noproj" / "golden.npz")
    return torch.from_numpy(arrays["prompt_kv_b2"][:, :, :, 0].transpose(0, 1, 3, 2, 4))


def checkpoint(folder, tensors, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "pytorch_model.bin")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["prefix_noproj", "prefix_proj"])
def test_upstreams_prefix_only_checkpoint(name):
    """P and the projection follow from the shapes: there is no config.json."""
    recorded = np.load(DATA / name / "golden.npz")["prompt_kv_b2"][:, :, :, 0].transpose(
        0, 1, 3, 2, 4
    )
    prefix = read_prefix(DATA / name, TINY, checkpoint_fingerprint="abc")
    assert np.abs(prefix.tensor.numpy() - recorded).max() < 1e-6
    assert (
        prefix.pre_seq_len == 8
        and not prefix.shifts_positions
        and prefix.checkpoint_fingerprint == "abc"
    )
    assert prefix.metadata["prefix_projection"] is (name == "prefix_proj")


@pytest.mark.parametrize("shards", [1, 3])
def test_an_old_checkpoint_with_the_whole_model(tmp_path, golden_prefix, shards):
    folder = tiny_folder(tmp_path)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state |= torch.load(DATA / "prefix_noproj" / "pytorch_model.bin", weights_only=True)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").unlink()
        write_shards(folder, state, shards)
    assert torch.equal(read_prefix(folder, TINY).tensor, golden_prefix)


def test_exported_and_read_again(tmp_path, golden_prefix):
    prefix = KVPrefix(golden_prefix, shifts_positions=False, checkpoint_fingerprint="", metadata={})
    folder = write_original(
        prefix, tmp_path / "checkpoint-5", {"model_type": "chatglm", "num_layers": 4}
    )
    saved = torch.load(folder / "pytorch_model.bin", weights_only=True)
    original = torch.load(DATA / "prefix_noproj" / "pytorch_model.bin", weights_only=True)
    assert saved.keys() == original.keys() == {KEY}
    assert saved[KEY].dtype == torch.float32 and torch.equal(saved[KEY], original[KEY])
    config = json.loads((folder / "config.json").read_text())
    assert (config["pre_seq_len"], config["prefix_projection"], config["num_layers"]) == (
        8,
        False,
        4,
    )
    assert torch.equal(read_prefix(folder, TINY).tensor, golden_prefix)


def test_a_checkpoint_for_another_model_names_both_sides():
    with pytest.raises(AdapterInvalid) as refusal:
        read_prefix(DATA / "prefix_noproj", BaseShape(layers=28, kv_heads=32, head_dim=128))
    assert "[8, 512]" in str(refusal.value) and "[P, 229376]" in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "sides"),
    [
        ({"pre_seq_len": 128}, ("config.json says pre_seq_len 128", "tensors have 8")),
        (
            {"pre_seq_len": 8, "prefix_projection": True},
            ("says prefix_projection True", "tensors have False"),
        ),
    ],
)
def test_a_config_that_contradicts_the_tensors(tmp_path, config, sides):
    with pytest.raises(AdapterInvalid) as refusal:
        read_prefix(
            checkpoint(tmp_path / "checkpoint-3000", {KEY: torch.zeros(8, 512)}, config), TINY
        )
    assert all(side in str(refusal.value) for side in sides)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lm_head.weight": torch.zeros(2, 2)}, "not a P-tuning checkpoint"),
        (
            {
                KEY: torch.zeros(8, 64),
                "transformer.prefix_encoder.trans.0.weight": torch.zeros(64, 64),
            },
            "lacks trans.0.bias",
        ),
    ],
)
def test_folders_that_hold_no_prefix(tmp_path, tensors, message):
    with pytest.raises(AdapterInvalid, match=message):
        read_prefix(checkpoint(tmp_path, tensors), TINY)


def test_empty_and_broken_folders(tmp_path):
    with pytest.raises(AdapterInvalid, match="holds no weights"):
        read_prefix(tmp_path, TINY)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a zip archive")
    with pytest.raises(AdapterInvalid, match="cannot be read"):
        read_prefix(tmp_path, TINY)


@pytest.fixture
def qwen():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("projection", [False, True])
def test_pefts_folder_and_back(qwen, tmp_path, projection):
    """What peft saved is read, written again and gives peft the same logits."""
    ids = torch.tensor([[5, 9, 2, 7]])
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3, prefix_projection=projection
    )
    tuned = get_peft_model(qwen, config).eval()
    for parameter in tuned.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    expected = tuned(input_ids=ids).logits
    tuned.save_pretrained(tmp_path / "peft")
    prefix = read_prefix(
        tmp_path / "peft", BaseShape(layers=2, kv_heads=2, head_dim=8), shifts_positions=True
    )
    assert prefix.shifts_positions and prefix.tensor.shape == (2, 2, 2, 3, 8)

    write_peft(prefix, tmp_path / "again", base_model="qwen")
    again = PeftModel.from_pretrained(
        tuned.unload() if hasattr(tuned, "unload") else qwen, tmp_path / "again"
    ).eval()
    assert torch.allclose(again(input_ids=ids).logits, expected, atol=1e-5)
    assert torch.equal(
        flatten(read_prefix(tmp_path / "again", BaseShape(2, 2, 8))), flatten(prefix)
    )


def test_pefts_cartridges_and_their_composition_and_back(qwen, tmp_path):
    """Saved by peft, read, written, read by peft: same logits, same frozen positions; two that are
    joined here are those that peft joins.
    """
    shape = BaseShape(layers=2, kv_heads=2, head_dim=8)
    ids = torch.arange(1, 8)[None]
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ours = []
    for number, (length, frozen) in enumerate(((6, 2), (4, 0))):
        torch.manual_seed(number)
        config = CartridgeConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length, num_frozen_tokens=frozen
        )
        tuned = get_peft_model(copy.deepcopy(qwen), config).eval()
        with torch.no_grad():
            expected = tuned(**asked).logits
        tuned.save_pretrained(tmp_path / f"theirs-{number}")
        prefix = read_prefix(tmp_path / f"theirs-{number}", shape, shifts_positions=True)
        assert prefix.metadata["num_frozen_tokens"] == frozen and prefix.pre_seq_len == length
        write_peft(prefix, tmp_path / f"ours-{number}", cartridge=True)
        again = PeftModel.from_pretrained(copy.deepcopy(qwen), tmp_path / f"ours-{number}").eval()
        with torch.no_grad():
            torch.testing.assert_close(again(**asked).logits, expected)
        assert again.peft_config["default"].num_frozen_tokens == frozen
        folder = tmp_path / f"portal-{number}"
        adapters.save(prefix, folder)
        ours.append(folder)
    theirs = [tmp_path / f"ours-{number}" for number in (0, 1)]
    compose_cartridge_adapters(theirs, output_path=tmp_path / "theirs-both")
    adapter_files.join(*ours, tmp_path / "ours-both", {})
    imported = read_prefix(tmp_path / "theirs-both", shape, shifts_positions=True)
    joined = adapters.load(tmp_path / "ours-both")
    assert torch.equal(imported.tensor, joined.tensor)
    frozen = [one.metadata["num_frozen_tokens"] for one in (imported, joined)]
    assert frozen == [2, 2]


@pytest.mark.parametrize("frozen", [-1, 7, "1", True, None])
def test_a_cartridge_that_contradicts_itself_is_refused(tmp_path, frozen):
    save_file({"prompt_embeddings": torch.zeros(6, 64)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "CARTRIDGE", "num_virtual_tokens": 6, "num_frozen_tokens": frozen}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterInvalid, match="num_frozen_tokens"):
        read_prefix(tmp_path, BaseShape(layers=2, kv_heads=2, head_dim=8))


def test_a_frozen_first_position_is_told_to_peft(tmp_path):
    told = {"recipe": {"freeze_first": True}}
    prefix = KVPrefix(torch.zeros(2, 2, 2, 5, 8), True, "", told)
    write_peft(prefix, tmp_path, cartridge=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_frozen_tokens"]) == ("CARTRIDGE", 1)


def test_other_peft_adapters_are_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(AdapterInvalid, match="LORA"):
        read_prefix(tmp_path, TINY)
