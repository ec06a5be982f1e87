"""The forward pass and generation against what the original implementation computed."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from chat.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMModel, PrefixCache
from chat.chatglm.positions import position_ids, prefix_lm_hidden, rotary_tables
from chat.checkpoints.foreign_adapters import BaseShape, read_prefix
from tests.support.tiny_chatglm import DATA

CASES = (
    "case_A_single_gmask",
    "case_B_batch3_leftpad",
    "case_B_model_built_masks",
    "case_C_train_rightpad",
    "case_D_mask_token",
    "case_E_mask_and_gmask",
)
GENERATED = ("case_A_single_gmask", "case_B_batch3_leftpad", "case_D_mask_token")
PREFIXES = ("prefix_noproj", "prefix_proj")
TOLERANCE = 2e-5
NEW = 24


def difference(tensor, array):
    return np.abs(tensor.detach().float().numpy() - array.astype(np.float32)).max()


def prefix_of(name):
    return read_prefix(DATA / name, BaseShape(layers=4, kv_heads=4, head_dim=16)).tensor


@pytest.mark.parametrize("name", CASES)
def test_logits_and_hidden_states(model, case, name):
    recorded = case(name)
    output = model(**recorded.inputs, output_hidden_states=True)
    assert difference(output.logits, recorded["logits"]) < TOLERANCE
    # recorded sequence first; their values are larger than the logits'
    if "hidden_states" in recorded.arrays:
        states = torch.stack(output.hidden_states).transpose(1, 2)
        assert difference(states, recorded["hidden_states"]) < 5e-5


@pytest.mark.parametrize("name", [name for name in CASES if name != "case_B_batch3_leftpad"])
def test_masks_and_positions_built_by_the_model(model, case, name):
    recorded = case(name)
    assert difference(model(input_ids=recorded.ids).logits, recorded["logits"]) < TOLERANCE
    assert torch.equal(position_ids(recorded.ids, model.config), recorded.inputs["position_ids"])
    assert torch.equal(
        prefix_lm_hidden(recorded.ids, model.config), recorded.inputs["attention_mask"]
    )


def test_masks_and_positions_of_a_left_padded_batch(model, case):
    recorded = case("case_B_batch3_leftpad")
    visible = (recorded.ids != 3).long()
    assert torch.equal(
        position_ids(recorded.ids, model.config, visible), recorded.inputs["position_ids"]
    )
    assert torch.equal(
        prefix_lm_hidden(recorded.ids, model.config, visible), recorded.inputs["attention_mask"]
    )
    logits = model(input_ids=recorded.ids, attention_mask=visible).logits
    assert difference(logits, recorded["logits"]) < TOLERANCE


def test_padding_on_either_side_changes_no_real_token(model, case):
    ids = case("case_A_single_gmask").ids
    alone = model(input_ids=ids).logits
    pads = torch.full((1, 5), 3)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(pads)
    left = model(
        input_ids=torch.cat((pads, ids), 1), attention_mask=torch.cat((zeros, ones), 1)
    ).logits
    right = model(
        input_ids=torch.cat((ids, pads), 1), attention_mask=torch.cat((ones, zeros), 1)
    ).logits
    assert (left[:, 5:] - alone).abs().max() < 1e-5
    assert (right[:, : ids.shape[1]] - alone).abs().max() < 1e-5
    assert torch.isfinite(left).all()


def test_attention_weights_and_cache(model, case):
    recorded = case("case_A_single_gmask")
    output = model(**recorded.inputs, output_attentions=True, use_cache=True)
    for layer in (0, 3):
        assert difference(output.attentions[layer][0], recorded[f"attn_layer{layer}"]) < TOLERANCE
    # recorded as [layer, seq, batch, heads, dim]
    for index, layer in enumerate(output.past_key_values.layers):
        assert difference(layer.keys.permute(2, 0, 1, 3), recorded["past_k"][index]) < TOLERANCE
        assert difference(layer.values.permute(2, 0, 1, 3), recorded["past_v"][index]) < TOLERANCE


@pytest.mark.parametrize("masks", ["tokenizer's", "padding only"])
@pytest.mark.parametrize("name", GENERATED)
def test_generation_token_for_token(model, case, name, masks):
    recorded = case(name)
    inputs = recorded.inputs
    if masks == "padding only":
        inputs = {"input_ids": recorded.ids, "attention_mask": (recorded.ids != 3).long()}
    greedy = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert np.array_equal(greedy.numpy(), recorded["greedy_ids"])
    beams = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, num_beams=4)
    assert np.array_equal(beams.numpy(), recorded["beam4_ids"])
    torch.manual_seed(0)
    sampled = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=True, top_p=0.7, temperature=0.95, top_k=50
    )
    assert np.array_equal(sampled.numpy(), recorded["sample_seed0_ids"])


def test_generation_without_a_cache(model, case):
    recorded = case("case_A_single_gmask")
    ids = model.generate(**recorded.inputs, max_new_tokens=NEW, do_sample=False, use_cache=False)
    assert np.array_equal(ids.numpy(), recorded["greedy_ids_nocache"])


def test_a_stream_does_not_lose_its_last_token(model, case):
    """Upstream's stream_generate stops before it yields the token that ends it: 11 of 12."""
    recorded = case("case_A_single_gmask")
    lost = recorded["stream_greedy_last_yield"]
    ids = model.generate(**recorded.inputs, max_new_tokens=12, do_sample=False).numpy()
    assert np.array_equal(ids[:, : lost.shape[1]], lost)
    assert ids.shape[1] == lost.shape[1] + 1


@pytest.mark.parametrize("name", PREFIXES)
@pytest.mark.parametrize("letter", "ABC")
def test_prefix(model, case, name, letter):
    recorded = case(next(known for known in CASES if known.startswith(f"case_{letter}")))
    golden = np.load(DATA / name / "golden.npz")
    prefix = prefix_of(name)
    # layer, k/v, head, P, dim
    recorded_prefix = golden["prompt_kv_b2"][:, :, :, 0].transpose(0, 1, 3, 2, 4)
    assert difference(prefix, recorded_prefix) < 1e-6

    output = model(**recorded.inputs, past_key_values=PrefixCache(prefix), use_cache=True)
    assert difference(output.logits, golden[f"logits_{letter}"]) < TOLERANCE
    length, batch, heads, dim = golden[f"past_len_{letter}"]
    assert output.past_key_values.layers[0].keys.shape == (batch, heads, length, dim)
    if letter != "C":
        greedy = model.generate(
            **recorded.inputs,
            past_key_values=PrefixCache(prefix),
            max_new_tokens=NEW,
            do_sample=False,
        )
        assert np.array_equal(greedy.numpy(), golden[f"greedy_{letter}"])


def test_beams_with_a_prefix_equal_beams_with_the_prefix_repeated(model, case):
    inputs = case("case_A_single_gmask").inputs
    prefix = prefix_of("prefix_noproj")
    one_row = model.generate(
        **inputs, past_key_values=PrefixCache(prefix), max_new_tokens=8, num_beams=3
    )
    rows = prefix.unsqueeze(2).expand(-1, -1, 3, -1, -1, -1)
    assert torch.equal(
        one_row,
        model.generate(**inputs, past_key_values=PrefixCache(rows), max_new_tokens=8, num_beams=3),
    )


def test_float_masks_and_embeddings_as_input(model, case):
    """The engine's way: an additive mask over the whole cache, explicit positions."""
    recorded = case("case_B_batch3_leftpad")
    hidden = recorded.inputs["attention_mask"]
    additive = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    output = model(
        inputs_embeds=model.get_input_embeddings()(recorded.ids),
        attention_mask=additive,
        position_ids=recorded.inputs["position_ids"],
    )
    assert difference(output.logits, recorded["logits"]) < TOLERANCE


def test_logits_to_keep(model, case):
    recorded = case("case_A_single_gmask")
    for kept, positions in ((2, [-2, -1]), (torch.tensor([3, 7]), [3, 7])):
        logits = model(**recorded.inputs, logits_to_keep=kept).logits
        assert difference(logits, recorded["logits"][:, positions]) < TOLERANCE


@pytest.mark.parametrize("size", ["tiny", "official_dim64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rotary_tables(size, dtype):
    """The official table is off by up to 0.45 in fp16 at large positions, and has to be."""
    name = {torch.float32: "fp32", torch.float16: "fp16"}[dtype]
    if size == "tiny":
        file = np.load(DATA / ("rotary_fp32.npz" if name == "fp32" else "half_precision.npz"))
        keys = ("cos", "sin") if name == "fp32" else ("rotary_cos_fp16", "rotary_sin_fp16")
        places = torch.arange(101)
    else:
        file, keys = np.load(DATA / "rotary_official_dim64.npz"), (f"cos_{name}", f"sin_{name}")
        places = torch.from_numpy(file["idx"])
    half = file[keys[0]].shape[1] // 2
    tables = rotary_tables(torch.stack((places, places))[None], 4 * half, dtype)
    for table, key in zip(tables, keys, strict=True):
        for part in range(2):  # place and block
            got = table[0, :, 0, 0, part].numpy()
            # torch's vectorised cosine moved by one unit in the last place over its versions
            assert (
                np.abs(got.astype(np.float32) - file[key][:, :half].astype(np.float32)).max() < 2e-7
            )


def test_half_precision(folder, case):
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()
    golden = np.load(DATA / "half_precision.npz")
    for letter, name in (("A", "case_A_single_gmask"), ("B", "case_B_batch3_leftpad")):
        recorded = case(name)
        logits = half(**recorded.inputs).logits
        assert logits.dtype == torch.float16
        real = (recorded.ids != 3).numpy()
        got, expected = logits.detach().numpy()[real], golden[f"{letter}_logits_fp16"][real]
        # as far from the recorded numbers as these are from fp32: the rounding of another order of
        # summation
        assert np.abs(got.astype(np.float32) - expected.astype(np.float32)).max() < 0.05
        # the same word wherever that rounding cannot decide between two
        best = np.sort(expected.astype(np.float32), axis=-1)
        clear = best[:, -1] - best[:, -2] > 0.05
        assert clear.mean() > 0.8
        assert (got.argmax(-1) == expected.argmax(-1))[clear].all()
    long_row = torch.from_numpy(golden["L_input_ids"])
    single = half.float()(input_ids=long_row).logits
    assert difference(single, golden["L_logits_fp32_from_fp16ckpt"]) < TOLERANCE


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ids: ids[:, :-1], "<sop>"),
        (lambda ids: torch.cat((ids[:, :-2], ids[:, -1:]), 1), "gMASK"),
    ],
)
def test_a_prompt_cut_short_is_named(model, case, spoil, message):
    with pytest.raises(ValueError, match=message):
        model(input_ids=spoil(case("case_A_single_gmask").ids))


@pytest.mark.parametrize("name", GENERATED)
def test_a_static_cache_is_refused_not_answered_wrongly(model, case, name):
    recorded = case(name)
    for mask in (recorded.inputs["attention_mask"], (recorded.ids != 3).long()):
        with pytest.raises(ValueError, match="DynamicCache"):
            model.generate(
                recorded.ids, attention_mask=mask, max_new_tokens=4, cache_implementation="static"
            )


def test_residual_scale_does_not_follow_the_depth():
    """alpha is sqrt(56) at any depth: one layer, all weights zero but the norms, leaves alpha^2
    times the input's norm.
    """
    config = ChatGLMConfig(
        vocab_size=8,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        inner_hidden_size=32,
        bos_token_id=4,
        eos_token_id=5,
        mask_token_id=6,
        gmask_token_id=7,
        pad_token_id=3,
    )
    model = ChatGLMModel(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.constant_(parameter, 1.0 if name.endswith("layernorm.weight") else 0.0)
    torch.nn.init.normal_(model.word_embeddings.weight)
    model.final_layernorm = torch.nn.Identity()
    output = model(torch.tensor([[0, 1, 7, 4]])).last_hidden_state
    assert abs(output.square().mean().sqrt().item() - 56**0.5) < 1e-3


def test_configurations_that_were_never_published_are_refused():
    with pytest.raises(ValueError, match="position_encoding_2d"):
        ChatGLMConfig(position_encoding_2d=False)
    with pytest.raises(ValueError, match="packed embeddings"):
        ChatGLMConfig(quantization_bit=4, quantization_embeddings=True)
    with pytest.raises(ValueError, match="quantization_bit is 3"):
        ChatGLMConfig(quantization_bit=3)
    with pytest.raises(ValueError, match="ChatGLM2"):
        ChatGLMConfig(
            num_layers=28,
            padded_vocab_size=65024,
            ffn_hidden_size=13696,
            multi_query_attention=True,
        )


def test_the_published_shape_weighs_what_it_is_said_to():
    """6.17e9 parameters: 12.35 GB in fp16, 6.71 GB at 8 bits and 3.89 GB at 4, of it packed linear
    layers 5.64 and 2.82 GB.
    """
    weights = {}
    for bits in (0, 8, 4):
        with torch.device("meta"):
            model = ChatGLMForConditionalGeneration(ChatGLMConfig(quantization_bit=bits)).half()
        packed = [parameter for parameter in model.parameters() if parameter.dtype == torch.int8]
        weights[bits] = sum(p.nbytes for p in model.parameters()), sum(p.nbytes for p in packed)
        if not bits:
            assert sum(parameter.numel() for parameter in model.parameters()) == 6_173_286_400
    assert weights == {
        0: (12_346_572_800, 0),
        8: (6_711_492_608, 5_637_144_576),
        4: (3_892_920_320, 2_818_572_288),
    }


def test_the_head_is_the_embedding():
    config = ChatGLMConfig(
        vocab_size=8,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        inner_hidden_size=32,
        bos_token_id=4,
        eos_token_id=5,
        mask_token_id=6,
        gmask_token_id=7,
        pad_token_id=3,
    )
    model = ChatGLMForConditionalGeneration(config)
    assert "lm_head.weight" not in model.state_dict()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
