"""Packed weights: bit-exact packing, logits of packed models, and the gradient to the
activations.
"""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from chat.chatglm import PrefixCache, quantization
from chat.chatglm.quantization import PackedLinear, pack, unpack
from tests.support.tiny_chatglm import DATA, tiny_folder

BITS = (4, 8)


@pytest.fixture(scope="module")
def golden():
    return np.load(DATA / "quant_full.npz")


def packed_layer(bits, rows=96, columns=64, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns)
    layer = PackedLinear(columns, rows, bits)
    packed, scale = pack(weight, bits)
    layer.weight, layer.weight_scale = nn.Parameter(packed, False), nn.Parameter(scale, False)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_bit_exact(bits):
    recorded = {
        key: torch.from_numpy(value) for key, value in np.load(DATA / "quant_linear.npz").items()
    }
    weight, stem = recorded["weight_fp32"], f"int{bits}"
    packed, scale = pack(weight, bits)
    assert torch.equal(packed, recorded[f"{stem}_packed"])
    assert torch.equal(scale, recorded[f"{stem}_scale_fp32"])
    assert torch.equal(unpack(packed, scale, bits), recorded[f"{stem}_dequant_fp32"])
    packed, scale = pack(weight.half(), bits)  # as the public checkpoints were made
    assert torch.equal(packed, recorded[f"{stem}_fp16path_packed"])
    assert torch.equal(scale, recorded[f"{stem}_fp16path_scale"])
    assert torch.equal(
        unpack(packed, scale, bits, torch.float32), recorded[f"{stem}_fp16path_dequant_fp32"]
    )


def test_the_even_column_is_in_the_high_half():
    packed, scale = pack(torch.tensor([[7.0, -7.0, 1.0, -1.0]]), 4)
    assert packed.tolist() == [[0x79, 0x1F]]
    assert scale.tolist() == [1.0]


@pytest.mark.parametrize("bits", BITS)
def test_a_row_of_zeros_stays_zero(bits):
    packed, scale = pack(torch.zeros(2, 8), bits)
    assert torch.equal(unpack(packed, scale, bits), torch.zeros(2, 8))


@pytest.mark.parametrize("chunk", [1 << 22, 64 * 7])
@pytest.mark.parametrize("bits", BITS)
def test_product_and_gradient_equal_the_unpacked_layers(monkeypatch, bits, chunk):
    """Also when the weight is unpacked a few rows at a time, with a last chunk that is not full."""
    monkeypatch.setattr(quantization, "_CHUNK_WEIGHTS", chunk)
    layer = packed_layer(bits)
    weight = unpack(layer.weight, layer.weight_scale, bits)
    x = torch.randn(2, 5, 64, requires_grad=True)
    plain = x.detach().clone().requires_grad_()
    upstream = torch.randn(2, 5, 96)
    layer(x).backward(upstream)
    expected = nn.functional.linear(plain, weight, layer.bias)
    expected.backward(upstream)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert torch.allclose(x.grad, plain.grad, atol=1e-4)
    assert layer.weight.grad is None and layer.weight_scale.grad is None


def test_only_packed_weights_are_kept_for_the_gradient():
    layer = packed_layer(4, rows=512, columns=512)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        layer(torch.randn(3, 512, requires_grad=True)).sum()
    assert sum(tensor.nbytes for tensor in kept) <= layer.weight.nbytes + layer.weight_scale.nbytes


def test_public_int4_checkpoint(tmp_path, case, golden):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder(tmp_path, weights="int4"), dtype=torch.float32
    )
    layer = model.transformer.layers[0].mlp.dense_h_to_4h
    assert isinstance(layer, PackedLinear)
    assert layer.weight.dtype == torch.int8 and layer.weight.shape == (256, 32)
    recorded = case("case_A_single_gmask")
    logits = model(**recorded.inputs).logits
    assert np.abs(logits.detach().numpy() - golden["A_logits_int4_from_file"]).max() < 2e-5
    ids = model.generate(**recorded.inputs, max_new_tokens=24, do_sample=False)
    assert np.array_equal(ids.numpy(), golden["A_greedy_int4_from_file"])


@pytest.mark.parametrize("asked", ["from_pretrained", "config"])
@pytest.mark.parametrize("bits", BITS)
def test_a_plain_checkpoint_is_packed_while_loading(folder, tmp_path, case, golden, bits, asked):
    if asked == "config":
        config = AutoConfig.from_pretrained(folder)
        config.quantization_bit = bits
        model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_bit=bits)
    inputs = case("case_A_single_gmask").inputs
    logits = model(**inputs).logits
    assert np.abs(logits.detach().numpy() - golden[f"A_logits_int{bits}"]).max() < 2e-5

    model.save_pretrained(tmp_path)  # the public packed layout again
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.quantization_bit == bits
    assert isinstance(again.transformer.layers[0].attention.dense, PackedLinear)
    assert torch.equal(again(**inputs).logits, logits)


def test_a_packed_checkpoint_is_not_packed_again(tmp_path):
    folder = tiny_folder(tmp_path, weights="int4")
    with pytest.raises(ValueError, match="packed at 4 bits"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_bit=8)


def test_training_flows_through_packed_layers(folder, case):
    """The gradient to a prefix equals that of the same weights unpacked."""
    packed = AutoModelForCausalLM.from_pretrained(folder, quantization_bit=4).requires_grad_(False)
    plain = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            plain.get_submodule(name).weight.copy_(unpack(module.weight, module.weight_scale, 4))
    ids = case("case_C_train_rightpad").ids
    torch.manual_seed(0)
    start = torch.randn(4, 2, 4, 5, 16)
    gradients = []
    for model in (packed.train(), plain.train()):
        prefix = start.clone().requires_grad_()
        model(
            input_ids=ids, labels=ids, past_key_values=PrefixCache(prefix), use_cache=False
        ).loss.backward()
        gradients.append(prefix.grad)
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


INTERPRETED = """
    import torch, triton
    from chat.chatglm import packed_matmul
    from chat.chatglm.quantization import pack, unpack

    torch.manual_seed(0)
    for bits in (8, 4):
        for rows, columns, outputs in ((1, 256, 48), (3, 192, 70), (17, 512, 33)):
            x, weight = torch.randn(rows, columns).half(), torch.randn(outputs, columns).half()
            packed, scale = pack(weight, bits)
            y = torch.empty(rows, outputs, dtype=torch.float16)
            packed_matmul._packed_linear.fn[(triton.cdiv(outputs, 16),)](
                x, packed, scale, y, rows, outputs, packed.shape[1],
                BITS=bits, BLOCK_ROWS=32, BLOCK_OUT=16, BLOCK_BYTES=64,
            )
            expected = x.float() @ unpack(packed, scale.float(), bits).T
            assert (y.float() - expected).abs().max() < 1e-3 * expected.abs().max(), (bits, rows)
"""


def test_the_kernel_in_tritons_interpreter():
    """Without a GPU: rows, columns and outputs that do not fill their blocks. Skipped where torch
    came without triton.
    """
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERPRETED)], check=True, env=environment
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 64, 65])
@pytest.mark.parametrize("bits", BITS)
def test_the_kernel_on_a_gpu(bits, rows):
    layer = packed_layer(bits, rows=4096, columns=1024).cuda().half()
    weight = unpack(layer.weight, layer.weight_scale.float(), bits)
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.float16)
    expected = nn.functional.linear(x.float(), weight, layer.bias.float())
    assert (layer(x).float() - expected).abs().max() < 5e-3 * expected.abs().max()
