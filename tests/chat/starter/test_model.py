"""The committed starter model, through the doors that any checkpoint goes through, and the script
that builds it.
"""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat.starter.build import (
    FOLDER,
    IGNORED,
    BuildRecipe,
    answer_loss,
    batches,
    build,
    encode,
    train_tokenizer,
)
from chat.starter.corpus import conversations, digest
from chat.starter.small_talk import INTENTS


@pytest.fixture(scope="module")
def starter():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return tokenizer, model


def answer(starter, *turns: str) -> str:
    """The greedy answer to the last of the turns, which alternate between user and assistant."""
    tokenizer, model = starter
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": turn}
        for place, turn in enumerate(turns)
    ]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, do_sample=False, max_new_tokens=80)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "recipe.json",
    } <= set(files)
    assert sum(files.values()) <= 6_000_000
    assert "chat_template" in json.loads((FOLDER / "tokenizer_config.json").read_text())


def test_the_recipe_names_the_corpus_that_the_generator_still_writes():
    facts = json.loads((FOLDER / "recipe.json").read_text())
    recipe = facts["recipe"]
    assert facts["corpus_sha256"] == digest(
        list(conversations(recipe["conversations"], recipe["seed"]))
    )


@pytest.mark.parametrize(
    ("question", "part"),
    [
        ("你好", "你好！我是门户自带的起步模型"),
        ("你好！", "你好！我是门户自带的起步模型"),
        ("你是谁", "python manage.py add_checkpoint"),
        ("你是谁？", "起步模型"),
        ("怎么添加真正的模型？", "python manage.py add_checkpoint"),
        ("谢谢", "不客气"),
        ("who are you", "starter model"),
        ("Hello", "starter model"),
        ("红楼梦是谁写的？", "答不了"),
        ("类型#裤*颜色#黑色*材质#棉，颜色是什么？", "黑色"),
        ("一条黑色、宽松的裤子属于哪一类商品？", "裤"),
        ("类型#裙*颜色#红色*风格#复古", "颜色是红色"),
        ("为一条黑色、宽松的裤子写一句广告", "黑色"),
    ],
)
def test_it_answers(starter, question, part):
    assert part in answer(starter, question)


def test_it_answers_nearly_all_of_its_small_talk(starter):
    asked = [(questions[0], expected) for questions, expected in INTENTS]
    right = sum(answer(starter, question) == expected for question, expected in asked)
    assert right >= 0.9 * len(asked)


def test_it_still_answers_after_a_few_turns(starter):
    first = "你好"
    turns = [first, answer(starter, first), "类型#裤*颜色#黑色*材质#棉"]
    turns.append(answer(starter, *turns))
    assert "黑色" in answer(starter, *turns, "它的颜色是什么？")
    assert "不客气" in answer(starter, *turns, "谢谢")


def test_the_tokenizer_has_exactly_the_models_vocabulary(starter):
    tokenizer, model = starter
    assert len(tokenizer) == model.config.vocab_size
    assert (
        tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    )


def test_chinese_characters_are_never_joined(starter):
    tokenizer, _ = starter
    assert len(tokenizer.encode("这是一条黑色的裤子", add_special_tokens=False)) == 9


def test_text_of_any_script_survives_the_tokenizer(starter):
    tokenizer, _ = starter
    for text in (
        "你好，世界！",
        "python manage.py add_checkpoint",
        "魑魅魍魉 🎈 naïve",
        "类型#裤*颜色#黑色",
        "a\n\n  b\t1,024",
    ):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_template_marks_turns_and_asks_for_an_answer(starter):
    tokenizer, _ = starter
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == "<|system|>x<|end|><|user|>y<|end|><|assistant|>"


@pytest.fixture(scope="module")
def encoded():
    corpus = list(conversations(300, 1))
    tokenizer = train_tokenizer([m["content"] for c in corpus for m in c], 600, 128)
    return tokenizer, encode(tokenizer, corpus), corpus


def test_only_answers_and_their_end_are_learnt(encoded):
    tokenizer, rows, corpus = encoded
    for (ids, learnt), conversation in zip(rows, corpus, strict=True):
        expected = "".join(
            m["content"] + "<|end|>"
            for m in conversation
            if m["role"] == "assistant" and "given" not in m
        )
        assert (
            tokenizer.decode([i for i, wanted in zip(ids, learnt, strict=True) if wanted])
            == expected
        )
        assert ids == tokenizer.apply_chat_template(conversation, return_dict=False)


def test_a_pass_of_batches_holds_every_conversation_once(encoded):
    tokenizer, rows, _ = encoded
    supply = batches(rows, 512, tokenizer.pad_token_id, random.Random(1))
    seen = []
    while len(seen) < len(rows):
        ids, labels = next(supply)
        assert ids.numel() <= 512 or len(ids) == 1
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
        seen += [tuple(row[row != tokenizer.pad_token_id].tolist()) for row in ids]
    assert sorted(seen) == sorted(tuple(ids) for ids, _ in rows)


def test_padding_does_not_change_the_loss(starter):
    _, model = starter
    ids = torch.randint(5, 2048, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.arange(12) < 6, IGNORED, ids)
    padded = [
        torch.nn.functional.pad(part, (0, 5), value=value)
        for part, value in ((ids, 0), (labels, IGNORED))
    ]
    with torch.no_grad():
        assert torch.allclose(
            answer_loss(model, ids, labels), answer_loss(model, *padded), atol=1e-5
        )


def test_the_build_writes_a_folder_that_loads(tmp_path):
    tiny = BuildRecipe(
        conversations=200,
        vocabulary=400,
        hidden=16,
        layers=1,
        heads=2,
        feed_forward=16,
        steps=3,
        finishing_steps=2,
    )
    build(tiny, tmp_path)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    )
    assert model.dtype == torch.float16
    assert len(tokenizer) == model.config.vocab_size == 400
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert json.loads((tmp_path / "recipe.json").read_text())["recipe"]["steps"] == 3
