"""Checkpoint and adapter folders: what they are, whether they fit, what is wrong with them."""

import json
import random

import pytest
import torch

from chat.checkpoints.describe import CheckpointInvalid, describe, fingerprint
from chat.engine import adapters
from chat.engine.adapters import AdapterInvalid, AdapterPool, KVPrefix
from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import load
from chat.engine.request import AdapterRef
from chat.ops.cpu_linear import OneDNNLinear, accelerate_linear
from tests.support.tiny_models import (
    adapter,
    byte_tokenizer,
    greedy,
    loaded_model,
    plain_model,
    random_prompt,
    reference,
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    plain_model("qwen2").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_loads_and_answers_as_the_model_that_was_saved(folder):
    loaded = load(folder, device="cpu")
    assert (loaded.layers, loaded.kv_heads, loaded.head_dim) == (3, 2, 8)
    assert (
        loaded.dtype == torch.float32
        and loaded.shifts_positions
        and loaded.fingerprint == fingerprint(folder)
    )
    prompt = random_prompt("qwen2", random.Random(1))
    (answer,) = Engine(loaded, EngineConfig(max_rows=1)).generate([greedy("1", prompt, 8)])
    assert answer.token_ids == reference("qwen2", prompt, 8, None)


def test_a_folder_is_described_from_its_files(folder):
    description = describe(folder)
    assert description["architecture"] == "Qwen2ForCausalLM"
    assert (description["layers"], description["hidden_size"], description["context_length"]) == (
        3,
        32,
        256,
    )
    assert description["parameters"] == sum(p.numel() for p in plain_model("qwen2").parameters())
    assert description["bytes"] > 0 and description["quantization_bit"] is None


def test_a_folder_may_wish_how_it_is_sampled(folder):
    wishes = folder / "generation_config.json"
    wishes.write_text(
        '{"temperature": 0.6, "top_k": 20, "top_p": 7, '
        '"repetition_penalty": "1", "max_new_tokens": 5}'
    )
    assert describe(folder)["sampling"] == {"temperature": 0.6, "top_k": 20}
    for broken in ("[]", "{", "[" * 100_000):
        wishes.write_text(broken)
        assert describe(folder)["sampling"] == {}


def test_the_fingerprint_knows_weights_configuration_and_tokenizer(folder):
    before = fingerprint(folder)
    assert before == fingerprint(folder)
    seen = {before}
    for name, change in (
        ("model.safetensors", b"\x01"),
        ("config.json", b" "),
        ("tokenizer.json", b" "),
    ):
        with (folder / name).open("ab") as file:
            file.write(change)
        seen.add(fingerprint(folder))
    assert len(seen) == 4
    (folder / "README.md").write_text("not part of it")
    assert fingerprint(folder) in seen


def broken(folder, fault):
    config = json.loads((folder / "config.json").read_text())
    if fault == "config_missing":
        (folder / "config.json").unlink()
    elif fault == "config_invalid":
        (folder / "config.json").write_text("{")
    elif fault == "unknown_model_type":
        (folder / "config.json").write_text(
            json.dumps({**config, "model_type": "bert_of_tomorrow"})
        )
    elif fault == "remote_code_only":
        new = {
            **config,
            "model_type": "chatglm",
            "ffn_hidden_size": 1,
            "auto_map": {"AutoModel": "modeling.Model"},
        }
        (folder / "config.json").write_text(json.dumps(new))
    elif fault == "unsupported_attention":
        new = {**config, "layer_types": ["linear_attention", "full_attention"]}
        (folder / "config.json").write_text(json.dumps(new))
    elif fault == "weights_missing":
        (folder / "model.safetensors").unlink()
    elif fault == "weights_invalid":
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    elif fault == "tokenizer_missing":
        (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize(
    "fault",
    [
        "config_missing",
        "config_invalid",
        "unknown_model_type",
        "remote_code_only",
        "unsupported_attention",
        "weights_missing",
        "weights_invalid",
        "tokenizer_missing",
    ],
)
def test_a_folder_that_cannot_be_loaded_says_why(folder, fault):
    with pytest.raises(CheckpointInvalid) as caught:
        load(broken(folder, fault))
    assert caught.value.code == fault


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"model_type": "mamba"}, "state_space"),
        ({"model_type": "jamba", "layers_block_type": ["mamba", "attention"]}, "mamba"),
        ({"model_type": "qwen3_next", "full_attention_interval": 4}, "linear_attention"),
        (
            {"model_type": "qwen3_5", "text_config": {"layer_types": ["linear_attention"]}},
            "linear_attention",
        ),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "latent_attention"),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 10}, "shared_keys"),
    ],
)
def test_layers_that_take_no_prefix_are_named_with_what_to_do(folder, config, layers):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointInvalid, match=r"manage\.py vllm_command") as caught:
        describe(folder)
    assert caught.value.code == "unsupported_attention"
    assert caught.value.parameters == {"layers": layers, "model_type": config["model_type"]}


def test_an_architecture_that_brings_its_own_code_is_refused_by_name(folder):
    """InternLM 2, whose modules transformers does not have."""
    config = {"model_type": "internlm2", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(CheckpointInvalid, match="internlm2") as caught:
        load(folder)
    assert caught.value.code == "remote_code_only"


def test_weights_cut_short_on_the_way_are_named_as_that(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointInvalid) as caught:
        load(folder)
    assert caught.value.code == "weights_invalid"


def test_a_missing_shard_is_named(folder):
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointInvalid, match="model-00002-of-00002"):
        describe(folder)


def test_describing_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, chat.checkpoints.describe, chat.engine.request; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_adapter_survives_the_disk(tmp_path):
    prefix = KVPrefix(torch.randn(3, 2, 2, 5, 8), False, "abc", {"run": 7})
    digest = adapters.save(prefix, tmp_path / "a")
    again = adapters.load(tmp_path / "a")
    assert torch.equal(again.tensor, prefix.tensor)
    assert (again.shifts_positions, again.checkpoint_fingerprint, again.metadata) == (
        False,
        "abc",
        {"run": 7},
    )
    assert len(digest) == 64 and digest == adapters.save(prefix, tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
    ]


def test_an_adapter_whose_description_lies_is_refused_with_both_sides(tmp_path):
    adapters.save(KVPrefix(torch.randn(3, 2, 2, 5, 8), True, ""), tmp_path)
    text = (tmp_path / "adapter.json").read_text()
    (tmp_path / "adapter.json").write_text(text.replace('"pre_seq_len": 5', '"pre_seq_len": 6'))
    with pytest.raises(AdapterInvalid, match=r"'pre_seq_len': 6.*\[3, 2, 5, 8\]"):
        adapters.load(tmp_path)


@pytest.mark.parametrize("fault", ["adapter.json", "adapter.safetensors"])
def test_a_torn_adapter_is_refused(tmp_path, fault):
    adapters.save(KVPrefix(torch.randn(3, 2, 2, 5, 8), True, ""), tmp_path)
    (tmp_path / fault).write_bytes(b"torn")
    with pytest.raises(AdapterInvalid):
        adapters.load(tmp_path)


def test_the_pool_forgets_the_adapter_that_was_used_least_recently(tmp_path):
    refs = [adapter("qwen2", tmp_path, 4, seed) for seed in range(4)]
    one = adapters.load(refs[0].folder).tensor.nbytes
    pool = AdapterPool(loaded_model("qwen2"), host_bytes=2 * one)
    for ref in (refs[0], refs[1], refs[0], refs[2]):
        pool.fetch(ref)
    assert pool.status()["resident"] == [refs[0].name, refs[2].name]
    assert pool.status()["host_bytes"] == 2 * one
    cached = AdapterRef(refs[0].name, "/nowhere")  # by name: the folder is read once
    assert torch.equal(pool.fetch(cached), adapters.load(refs[0].folder).tensor)


def test_onednn_layers_give_the_same_numbers_and_gradients():
    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 8, bias=False)
    )
    fast = torch.nn.Sequential(
        torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 8, bias=False)
    )
    fast.load_state_dict(plain.state_dict())
    fast.requires_grad_(False)
    if not accelerate_linear(fast, free_bytes=1 << 30):
        pytest.skip("this build of torch has no oneDNN")
    assert (
        isinstance(fast[0], OneDNNLinear) and fast.state_dict().keys() == plain.state_dict().keys()
    )
    inputs = [torch.randn(2, 5, 24).requires_grad_() for _ in range(2)]
    inputs[1].data = inputs[0].data.clone()
    for model, given in zip((plain, fast), inputs, strict=True):
        model(given).square().sum().backward()
    assert torch.allclose(plain(inputs[0]), fast(inputs[1]), atol=1e-5)
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-4)
    with torch.no_grad():
        fast[0].weight.mul_(2)  # a packed copy would be stale now
        plain[0].weight.mul_(2)
        assert torch.allclose(plain(inputs[0]), fast(inputs[1]), atol=1e-5)


def test_layers_that_are_being_trained_stay_torchs_own():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    assert accelerate_linear(model, free_bytes=1 << 30) == 0 and type(model[0]) is torch.nn.Linear
