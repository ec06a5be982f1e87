"""GGUF files become folders that answer as the models they were made from."""

import struct

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat.checkpoints.describe import describe
from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.gguf import convert
from chat.checkpoints.fetch.gguf_file import read_header
from chat.checkpoints.fetch.progress import Watch
from tests.support.gguf_writing import KINDS, model_of, write_gguf
from tests.support.tiny_models import CHAT_TEMPLATE, byte_tokenizer

TEXT = "hello 12345  world, 裙子的颜色\n\n don't <|user|>"


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_computes_what_the_original_model_does(tmp_path, kind):
    original = model_of(kind)
    convert(write_gguf(tmp_path / "m.gguf", original), tmp_path / "out", Watch(), "float32")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(4, 300, (1, 100), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    assert describe(tmp_path / "out")["architecture"] == type(original).__name__


def test_packed_weights_come_as_the_values_they_stand_for_in_half_precision(tmp_path):
    original, packing = model_of("qwen2"), gguf.GGMLQuantizationType.Q8_0
    convert(write_gguf(tmp_path / "m.gguf", original, packed=packing), tmp_path / "out", Watch())
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert ours.dtype == torch.bfloat16
    for name, theirs in original.state_dict().items():
        if theirs.dim() == 2:
            once = gguf.dequantize(gguf.quantize(theirs.numpy(), packing), packing)
            assert torch.equal(ours.state_dict()[name], torch.from_numpy(once).bfloat16()), name


def test_large_weights_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("chat.checkpoints.fetch.gguf.SHARD_BYTES", 60_000)
    monkeypatch.setattr("chat.checkpoints.fetch.gguf.ROWS_BYTES", 1_000)
    original = model_of("qwen2")
    convert(write_gguf(tmp_path / "m.gguf", original), tmp_path / "out", Watch(), "float32")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, theirs in original.state_dict().items():
        assert torch.equal(ours.state_dict()[name], theirs), name


def test_tokenizer_and_template_come_along(tmp_path):
    convert(write_gguf(tmp_path / "m.gguf", model_of("qwen2")), tmp_path / "out", Watch())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHAT_TEMPLATE and tokenizer.eos_token == "<|end|>"
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids) == TEXT and tokenizer.convert_tokens_to_ids("<|user|>") == ids[-1]
    turns = [{"role": "user", "content": "hello"}]
    theirs = byte_tokenizer().apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert (
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == theirs
    )


def test_a_vocabulary_that_keeps_digits_apart_does_so(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), cut="smollm")
    convert(path, tmp_path / "out", Watch())
    pieces = AutoTokenizer.from_pretrained(tmp_path / "out").backend_tokenizer.pre_tokenizer
    words = [word for word, _ in pieces.pre_tokenize_str("a  12")]
    assert words == ["a", "ĠĠ", "1", "2"]


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ({"architecture": "bloom"}, "gguf_architecture", "bloom"),
        ({"cut": "of-tomorrow"}, "gguf_tokenizer", "of-tomorrow"),
        ({"leave_out": "blk.1.attn_q.weight"}, "gguf_damaged", "layers.1.self_attn.q_proj"),
        ({"leave_out": "token_embd.weight"}, "gguf_damaged", "token_embd"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path, options, code, named):
    path = write_gguf(tmp_path / "m.gguf", model_of("qwen2"), **options)
    with pytest.raises(FetchFailed, match=named) as caught:
        convert(path, tmp_path / "out", Watch())
    assert caught.value.code == code


def test_damaged_headers_end_in_a_message_and_take_no_memory(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf", model_of("qwen2")).read_bytes()
    cases = [
        b"",
        b"GGUF",
        b"not a model",
        whole[:300],
        b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60),
        # one key whose value is a list of 2**61 numbers
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 61),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99),
    ]
    for number, content in enumerate(cases):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(content)
        with pytest.raises(FetchFailed) as caught:
            read_header(path)
        assert caught.value.code == "gguf_damaged", number
    (tmp_path / "cut.gguf").write_bytes(whole[:-10_000])
    with pytest.raises(FetchFailed, match="cut off"):
        convert(tmp_path / "cut.gguf", tmp_path / "out", Watch())
