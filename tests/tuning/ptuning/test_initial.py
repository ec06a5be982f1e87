"""How a prefix begins: behind the keys and values of a text a prompt gets the logits that it gets
behind the text itself.
"""

from dataclasses import replace

import pytest
import torch

from tests.support import tiny_training as tiny
from tests.support.tiny_models import loaded_model
from tuning.ptuning.initial import TextTooLong, keys_and_values, text_ids
from tuning.ptuning.prefix import PrefixEncoder, TrainingPrefixCache
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.trainer import Stopped, Trainer, TrainingFailed

RECIPE = Recipe(
    pre_seq_len=24,
    learning_rate=5e-2,
    max_steps=3,
    per_device_train_batch_size=5,
    gradient_accumulation_steps=1,
    max_source_length=40,
    max_target_length=24,
    init="prompt",
    init_text="写广告",
)
PROMPT = [{"role": "user", "content": "裙子 白色"}]


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_prompt_behind_the_keys_of_a_text_is_a_prompt_behind_the_text(kind):
    loaded = tiny.loaded(kind)
    text = text_ids(loaded, "写广告", tiny.examples(), 24)
    assert len(text) == 24
    prompt = loaded.prompter.prompt_ids(PROMPT)
    whole = loaded.model(input_ids=torch.tensor([text + prompt])).logits[0, len(text) :]
    behind = loaded.model(
        input_ids=torch.tensor([prompt]),
        past_key_values=TrainingPrefixCache(keys_and_values(loaded, text), 1),
        use_cache=True,
    ).logits[0]
    torch.testing.assert_close(behind, whole, rtol=1e-4, atol=1e-4)


def test_chatglm_turns_the_keys_back_on_the_axis_of_places_alone():
    """The text sees nothing but itself, the prompt all of it; from <sop> on the second axis, the
    block, counts, and the text's block is 0 as the prompt's is.
    """
    loaded = loaded_model("chatglm")
    config = loaded.model.config
    text = list(range(40, 59))
    prompt = [5, 9, 17, 23, config.gmask_token_id, config.bos_token_id, 30, 31]
    context = prompt.index(config.bos_token_id)

    places = [*range(context), *[context - 1] * (len(prompt) - context)]
    blocks = [*[0] * context, *range(1, len(prompt) - context + 1)]
    shifted = [*range(len(text)), *(place + len(text) for place in places)]
    length = len(text) + len(prompt)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    hidden[:, : len(text)] = False  # everything sees the text
    hidden[len(text) :, len(text) : len(text) + context] = False  # the prompt sees itself
    hidden[: len(text), len(text) :] = True  # the text sees nothing of the prompt
    mask = torch.zeros(1, 1, length, length).masked_fill(hidden, torch.finfo(torch.float32).min)
    whole = loaded.model(
        input_ids=torch.tensor([text + prompt]),
        position_ids=torch.tensor([[shifted, [0] * len(text) + blocks]]),
        attention_mask=mask,
    ).logits[0, len(text) :]

    prefix = keys_and_values(loaded, text)
    behind = loaded.model(
        input_ids=torch.tensor([prompt]),
        past_key_values=TrainingPrefixCache(prefix, 1),
        use_cache=True,
    ).logits[0]
    torch.testing.assert_close(behind, whole, rtol=1e-4, atol=2e-4)
    assert not torch.allclose(behind, loaded.model(input_ids=torch.tensor([prompt])).logits[0])


def test_a_text_is_filled_up_with_examples_and_refused_when_it_is_longer_than_the_prefix():
    loaded = tiny.loaded()
    short = loaded.prompter.context_ids("写广告", ())
    assert text_ids(loaded, "写广告", [], len(short)) == short
    longer = text_ids(loaded, "写广告", tiny.examples(), 90)
    assert len(longer) == 90 and "答" in loaded.tokenizer.decode(longer)
    assert len(text_ids(loaded, "写广告", [], 90)) == 90  # no examples: the text again
    with pytest.raises(TextTooLong) as fault:
        text_ids(loaded, "写广告", tiny.examples(), 5)
    assert (fault.value.tokens, fault.value.room) == (len(short), 5)
    with pytest.raises(TrainingFailed) as failed:
        Trainer(loaded, replace(RECIPE, pre_seq_len=5), tiny.examples())
    assert failed.value.code == "init_text_too_long"


def test_zero_and_prompt_begin_as_they_say_and_the_first_position_can_be_frozen():
    loaded = tiny.loaded()
    assert not Trainer(loaded, replace(RECIPE, init="zero"), tiny.examples()).encoder().any()
    trainer = Trainer(loaded, replace(RECIPE, freeze_first=True), tiny.examples())
    start = trainer.encoder().detach().clone()
    text = text_ids(loaded, "写广告", tiny.examples(), 24)
    torch.testing.assert_close(start, keys_and_values(loaded, text))
    end = trainer.train().tensor
    assert torch.equal(end[:, :, :, 0], start[:, :, :, 0])
    assert not torch.equal(end[:, :, :, 1], start[:, :, :, 1])


def test_a_random_start_is_upstreams_to_the_bit():
    trainer = Trainer(tiny.loaded(), replace(RECIPE, init="random"), tiny.examples())
    torch.manual_seed(RECIPE.seed)
    plain = PrefixEncoder(pre_seq_len=24, layers=3, kv_heads=2, head_dim=8)
    assert torch.equal(trainer.encoder.embedding.weight, plain.embedding.weight)


def test_a_run_goes_on_from_another_prefix(tmp_path):
    recipe = replace(RECIPE, init="adapter", init_adapter="0" * 64)
    first = Trainer(tiny.loaded(), RECIPE, tiny.examples()).train()
    later = Trainer(tiny.loaded(), recipe, tiny.examples(), initial=first.tensor)
    assert torch.equal(later.kv_prefix().tensor, first.tensor)
    straight = later.train()
    with pytest.raises(Stopped):
        Trainer(
            tiny.loaded(),
            recipe,
            tiny.examples(),
            tmp_path,
            lambda progress: progress.step == 2,
            initial=first.tensor,
        ).train()
    resumed = Trainer(tiny.loaded(), recipe, tiny.examples(), tmp_path, initial=first.tensor)
    assert torch.equal(resumed.train().tensor, straight.tensor)
    for wrong in (None, first.tensor[:, :, :, :2]):
        with pytest.raises(TrainingFailed) as failed:
            Trainer(tiny.loaded(), recipe, tiny.examples(), initial=wrong)
        assert failed.value.code == "no_adapter_to_go_on_from"
