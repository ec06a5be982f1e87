"""Each family of models, from the folder that people register to the tuned model in a batch beside
its base: chat, P-tuning, resume, evaluation, with the chat template that the family publishes.
"""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from chat.chatglm import PrefixCache
from chat.checkpoints.describe import describe
from chat.engine.adapters import save
from chat.engine.engine import Engine, EngineConfig
from chat.engine.loading import load
from chat.engine.request import AdapterRef, Request, SamplingParams
from evaluation.predict import engine_for, messages_of, predict
from tests.support import chat_families
from tests.support.tiny_chatglm import tiny_folder
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.trainer import Stopped, Trainer

NEW = 12  # tokens of an answer
SOURCE = 100  # of a prompt, with the system prompts that some templates bring
RECIPE = Recipe(
    pre_seq_len=6,
    learning_rate=0.5,  # large, so that the tuned model says something else
    max_steps=4,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
    max_source_length=SOURCE,
    max_target_length=12,
    save_steps=2,
    seed=3,
)
ROWS = [
    {"prompt": f"a small vocabulary {number}", "response": "white " * number, "history": []}
    for number in range(1, 7)
]
SAID = (
    {"role": "user", "content": "hello world, this is a small vocabulary."},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "which colour?"},
)
EVERY = [
    pytest.param(name, marks=() if name == "Gemma 3" else pytest.mark.slow)
    for name in (*chat_families.FAMILIES, "ChatGLM-6B")
]


def folder_of(name, folder):
    return tiny_folder(folder) if name == "ChatGLM-6B" else chat_families.write(name, folder)


def expected(folder, prefix=None):
    """Greedy tokens of transformers alone: its template, its loading, its generate."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval().float()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    told = tokenizer.apply_chat_template(
        list(SAID), add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    cache, mask = None, torch.ones_like(told)
    if prefix is not None:
        cache = DynamicCache([(keys[None], values[None]) for keys, values in prefix])
        mask = torch.ones(1, prefix.shape[3] + told.shape[1])
    # generate() would cut what the cache "has seen" off the prompt, so it is asked by hand
    ids, found = told, []
    position = 0 if prefix is None else prefix.shape[3]
    for _ in range(NEW):
        places = torch.arange(position, position + ids.shape[1])[None]
        out = model(
            ids,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        )
        cache, position = out.past_key_values, position + ids.shape[1]
        ids = out.logits[:, -1].argmax(-1)[None]
        mask = torch.cat([mask, torch.ones(1, 1, dtype=mask.dtype)], dim=1)
        found.append(int(ids))
        if found[-1] == tokenizer.eos_token_id:
            break
    return tuple(found)


def expected_of_chatglm(loaded, prefix=None):
    ids = torch.tensor([loaded.prompter.prompt_ids(SAID)])
    cache = {} if prefix is None else {"past_key_values": PrefixCache(prefix)}
    made = loaded.model.generate(ids, max_new_tokens=NEW, do_sample=False, **cache)
    return tuple(made[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("name", EVERY)
def test_a_family_is_chatted_with_tuned_resumed_evaluated_and_mixed(name, tmp_path):
    torch.set_num_threads(1)
    folder = folder_of(name, tmp_path / "checkpoint")
    assert describe(folder)["chat_template"] is True
    loaded = load(folder, device="cpu", dtype=torch.float32)

    straight = Trainer(loaded, RECIPE, ROWS).train()
    with pytest.raises(Stopped):
        Trainer(loaded, RECIPE, ROWS, tmp_path / "run", report=lambda p: p.step == 2).train()
    resumed = Trainer(load(folder, device="cpu"), RECIPE, ROWS, tmp_path / "run").train()
    assert torch.equal(resumed.tensor, straight.tensor)
    ref = AdapterRef(save(straight, tmp_path / "adapter"), str(tmp_path / "adapter"))
    other = replace(straight, tensor=-straight.tensor)
    second = AdapterRef(save(other, tmp_path / "second"), str(tmp_path / "second"))

    sampling = SamplingParams(do_sample=False, max_new_tokens=NEW)
    asked = {"base": None, "tuned": ref, "second": second, "base again": None}
    engine = Engine(loaded, EngineConfig(max_rows=4, prefill_tokens=64))
    answers = engine.generate(
        Request(id, messages=SAID, adapter=adapter, sampling=sampling)
        for id, adapter in asked.items()
    )
    tensors = {"base": None, "tuned": straight.tensor, "second": other.tensor, "base again": None}
    for answer in answers:
        prefix = tensors[answer.id]
        if name == "ChatGLM-6B":
            assert answer.token_ids == expected_of_chatglm(loaded, prefix), answer.id
        else:
            assert answer.token_ids == expected(folder, prefix), answer.id
    if name != "Mistral":  # three layers that see 16 tokens back do not see the prefix from there
        assert len({answer.token_ids for answer in answers}) == 3

    rows = [(number, messages_of(row["prompt"])) for number, row in enumerate(ROWS)]
    predicted = {
        one.row: one
        for one in predict(
            engine_for(loaded, SOURCE, NEW, 6),
            rows,
            adapter=ref,
            max_source_length=SOURCE,
            max_target_length=NEW,
        )
    }
    assert len(predicted) == len(rows) and not any(one.error for one in predicted.values())
    alone = engine.generate(
        Request(f"row {number}", messages=tuple(said), adapter=ref, sampling=sampling)
        for number, said in rows
    )
    cleaned = {number: loaded.prompter.clean(one.text) for number, one in predicted.items()}
    assert cleaned == {number: answer.text for number, answer in enumerate(alone)}
