"""Official-layout folders through the Auto classes."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from chat.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMModel
from chat.checkpoints.describe import CheckpointInvalid
from chat.engine.loading import load
from tests.support.tiny_chatglm import DATA, tiny_folder, write_shards


def state_of(folder):
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


@pytest.fixture
def ids(case):
    return case("case_A_single_gmask").ids


@pytest.fixture
def expected(model, ids):
    return model(input_ids=ids).logits


def test_every_recorded_key_is_known(folder):
    """The recorded state dict, less what is recomputed or tied, is exactly ours."""
    recorded = json.loads((DATA / "state_dict_shapes.json").read_text())
    shapes = {name: shape for name, (shape, _) in recorded.items()}
    own = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(
        "inv_freq" in name or name == "lm_head.weight" for name in shapes.keys() - own.keys()
    )
    assert {name: list(tensor.shape) for name, tensor in own.items()} == {
        name: shapes[name] for name in own
    }


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
def test_auto_classes(folder, ids, expected, auto):
    loaded = auto.from_pretrained(folder)
    assert isinstance(loaded, ChatGLMForConditionalGeneration)
    assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_code_in_the_folder_is_never_run(tmp_path, ids, expected):
    folder = tiny_folder(tmp_path)
    for name in ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm"):
        (folder / f"{name}.py").write_text("raise SystemExit('remote code was run')")
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer_config["auto_map"] = {
        "AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is ChatGLMConfig
    assert type(AutoTokenizer.from_pretrained(folder)).__module__ == "chat.chatglm.tokenization"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(input_ids=ids).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_shards_with_a_stale_index(tmp_path, ids, expected):
    """fp16 in three shards; the index's total is wrong, as the published one's is. The weights are
    exact in fp16.
    """
    folder = tiny_folder(tmp_path, weights="fp16")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float16
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits,
        expected,
    )


def test_layer_norms_may_be_stored_in_fp32(tmp_path, ids, expected):
    folder = tiny_folder(tmp_path)
    state = {
        name: tensor if "layernorm" in name else tensor.half()
        for name, tensor in state_of(folder).items()
    }
    torch.save(state, folder / "pytorch_model.bin")
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits,
        expected,
    )


def test_of_a_differing_head_the_embedding_wins(tmp_path, ids, expected):
    folder = tiny_folder(tmp_path)
    state = state_of(folder)
    state["lm_head.weight"] = torch.randn_like(state["lm_head.weight"])
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    "silent", [(), ("mask_token_id", "gmask_token_id"), ("mask_token_id", "eos_token_id")]
)
def test_the_oldest_vocabulary_layout(tmp_path, ids, expected, silent):
    """20,000 unused image tokens stand first, every id is 20,000 higher; the first config.json did
    not name them all.
    """
    images = 20000
    folder = tiny_folder(tmp_path)
    state = state_of(folder)
    for name in ("transformer.word_embeddings.weight", "lm_head.weight"):
        state[name] = torch.cat((torch.randn(images, 64), state[name]))
    torch.save(state, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] += images
    for name in ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id"):
        config[name] += images
    config = {name: value for name, value in config.items() if name not in silent}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    del tokenizer_config["num_image_tokens"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    old = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(old(input_ids=ids + images).logits[..., images:], expected, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("你好")[-2:] == [old.config.gmask_token_id, old.config.bos_token_id]
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (
        old.config.mask_token_id,
        old.config.eos_token_id,
    )


@pytest.mark.parametrize("vocabulary", [130528, 150528])
def test_special_ids_that_no_config_names(vocabulary):
    config, offset = ChatGLMConfig(vocab_size=vocabulary, bos_token_id=None), vocabulary - 130528
    assert (config.mask_token_id, config.gmask_token_id) == (130000 + offset, 130001 + offset)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        130004 + offset,
        130005 + offset,
        3 + offset,
    )


def test_saved_and_loaded_again(folder, tmp_path, ids, expected):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits, expected
    )
    assert isinstance(ChatGLMModel.from_pretrained(tmp_path), ChatGLMModel)


def test_an_old_tuning_checkpoint_with_the_whole_model_loads(tmp_path, ids, expected):
    folder = tiny_folder(tmp_path)
    state = state_of(folder)
    state["transformer.prefix_encoder.embedding.weight"] = torch.randn(8, 512)
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits, expected)


def test_a_missing_shard_is_an_error_not_random_weights(tmp_path):
    folder = tiny_folder(tmp_path)
    state = state_of(folder)
    del state["transformer.layers.3.mlp.dense_h_to_4h.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"lacks 1 .* transformer.layers.3.mlp.dense_h_to_4h.weight"
    ):
        AutoModelForCausalLM.from_pretrained(folder)


def test_weights_that_the_config_does_not_describe_are_an_error(folder, tmp_path):
    """Layers too many, and packed weights without quantization_bit, whose integers would be taken
    for the weights.
    """
    AutoModelForCausalLM.from_pretrained(folder, quantization_bit=8).save_pretrained(
        tmp_path / "int8"
    )
    for source, change in (
        (folder, {"num_layers": 3}),
        (tmp_path / "int8", {"quantization_bit": 0}),
    ):
        changed = shutil.copytree(source, tmp_path / "changed", dirs_exist_ok=True)
        config = json.loads((changed / "config.json").read_text())
        (changed / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=f"does not describe.*{next(iter(change))}"):
            AutoModelForCausalLM.from_pretrained(changed)
        shutil.rmtree(changed)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "ice_text.model"])
@pytest.mark.parametrize("damage", ["cut short", "a pointer", "empty"])
def test_a_damaged_file_is_one_kind_of_error(folder, tmp_path, name, damage):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    if name == "model.safetensors":
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(damaged)
    content = (damaged / name).read_bytes()
    rests = {
        "cut short": content[: len(content) // 2],
        "a pointer": b"version https://git-lfs.github.com/spec/v1\n",
    }
    (damaged / name).write_bytes(rests.get(damage, b""))
    with pytest.raises(OSError, match="vocabulary" if name == "ice_text.model" else name):
        AutoTokenizer.from_pretrained(damaged)
        AutoModelForCausalLM.from_pretrained(damaged)


def test_a_tokenizer_whose_ids_the_model_does_not_have_is_refused(tmp_path):
    """Without tokenizer_config.json the tokenizer's own default makes room for 20,000 images, as
    upstream's does.
    """
    folder = tiny_folder(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointInvalid, match="tokenizer_config"):
        load(folder, device="cpu")


def test_a_cache_folder_of_links_that_may_not_be_written(folder, tmp_path, ids, expected):
    """As the Hugging Face hub lays it out: links to files of other names. What is saved holds files
    again.
    """
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs", str(number)))
    snapshot.chmod(0o555)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(snapshot)(input_ids=ids).logits, expected
    )
    AutoTokenizer.from_pretrained(snapshot).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "ice_text.model").is_file() and not (
        tmp_path / "saved/ice_text.model"
    ).is_symlink()
    snapshot.chmod(0o755)


class Surprise:
    def __reduce__(self):
        return (print, ("a pickle was run",))


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    folder = tiny_folder(tmp_path)
    torch.save({**state_of(folder), "extra": Surprise()}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="tensors alone"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert "a pickle was run" not in capsys.readouterr().out


def test_a_device_map_spreads_the_layers(folder, tmp_path, ids, expected):
    """Two places without two GPUs: the last layers live on disk and are brought in when they are
    needed.
    """
    names = ["word_embeddings", "layers.0", "layers.1", "layers.2", "layers.3", "final_layernorm"]
    places = {
        f"transformer.{name}": "cpu" if index < 3 else "disk" for index, name in enumerate(names)
    }
    spread = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path
    )
    assert spread.transformer.layers[3].mlp.dense_h_to_4h.weight.is_meta
    assert torch.allclose(spread(input_ids=ids).logits, expected, atol=1e-5)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(folder, device_map="auto")(input_ids=ids).logits,
        expected,
    )


MEASURE = """
    import sys, threading, time
    import torch
    import chat.chatglm
    from transformers import AutoModelForCausalLM

    def resident():  # MB, mapped files included
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024

    torch.set_num_threads(1)
    AutoModelForCausalLM.from_pretrained(sys.argv[1])  # warm: libraries, thread pools
    start, peak, over = resident(), 0, False

    def watch():
        global peak
        while not over:
            peak = max(peak, resident())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    options = {"quantization_bit": int(sys.argv[4])} if len(sys.argv) > 4 else {}
    dtype = getattr(torch, sys.argv[3])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=dtype, **options)
    over = True
    thread.join()
    print((peak - start) / (sum(parameter.nbytes for parameter in model.parameters()) / 2**20))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_takes_little_more_than_the_weights(folder, tmp_path):
    """A mid-size model with the published vocabulary, head stored twice: fp16 shards into every
    precision that we serve.
    """
    config = ChatGLMConfig(
        hidden_size=512, num_layers=8, num_attention_heads=8, inner_hidden_size=2048
    )
    config.dtype = torch.float16
    model = ChatGLMForConditionalGeneration(config).half()
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["transformer.word_embeddings.weight"].clone()
    config.save_pretrained(tmp_path)
    write_shards(tmp_path, state, shards=4)
    del model, state
    for options in (
        ["float16"],
        ["float32"],
        ["float16", "4"],
        ["float16", "8"],
        ["float32", "4"],
        ["float32", "8"],
    ):
        arguments = [sys.executable, "-c", textwrap.dedent(MEASURE), folder, tmp_path, *options]
        ratio = float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
        assert ratio <= 1.1, options
