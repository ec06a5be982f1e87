"""Prefixes that learn as rows of one batch, against each of them alone."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.support import tiny_training as tiny
from tests.support.tiny_models import loaded_model
from tuning.ptuning.progress import Stopped, TrainingFailed
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.sweep import Sweep
from tuning.ptuning.trainer import Trainer

RECIPE = Recipe(
    pre_seq_len=4,
    learning_rate=5e-2,
    max_steps=6,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_source_length=40,
    max_target_length=24,
    logging_steps=2,
    save_steps=2,
    eval_steps=3,
    seed=7,
)
VARIANTS = [
    RECIPE,
    replace(RECIPE, seed=8, prefix_dropout=0.3),
    replace(RECIPE, learning_rate=1e-2, init="zero", weight_decay=0.1),
    replace(RECIPE, kl_weight=0.5, kl_share=0.5, init="prompt", pre_seq_len=12, init_text="a"),
    replace(RECIPE, prefix_projection=True, lr_scheduler_type="constant"),
]
ROWS = tiny.examples(9)
PROMPTS = ["what", "who is it", "why"]


def made(loaded, recipe, **more):
    return Trainer(
        loaded,
        recipe,
        ROWS[2:],
        validation=ROWS[:2],
        general_prompts=PROMPTS,
        micro_batch_tokens=150,
        **more,
    )


def sweep(loaded, recipes=VARIANTS[1:4], **more):
    return Sweep([partial(made, loaded, recipe) for recipe in recipes], **more)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3", "chatglm"])
def test_each_variant_learns_what_it_learns_alone(kind):
    loaded = loaded_model(kind) if kind == "chatglm" else tiny.loaded(kind)
    recipes = VARIANTS if kind == "qwen2" else VARIANTS[:3]
    told = []
    joint = sweep(loaded, recipes, report=lambda number, told_of: told.append((number, told_of)))
    for number, (recipe, prefix) in enumerate(zip(recipes, joint.train(), strict=True)):
        alone = []
        lone = made(loaded, recipe, report=alone.append).train()
        torch.testing.assert_close(prefix.tensor, lone.tensor, rtol=2e-3, atol=2e-4)
        mine = [progress for variant, progress in told if variant == number]
        for one, other in zip(mine, alone, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-4)
            for mine_of, theirs in [
                (one.divergence, other.divergence),
                (one.validation, other.validation),
            ]:
                assert (mine_of is None) == (theirs is None)
                assert (mine_of or 0) == pytest.approx(theirs or 0, rel=1e-3, abs=1e-6)
            assert one.learning_rate == other.learning_rate


def test_a_step_is_one_batch_for_all_variants_of_a_length():
    loaded = tiny.loaded()
    batches = []
    plain = loaded.model.base_model.forward

    def counted(*arguments, **named):
        batches.append(len(named["input_ids"]))
        return plain(*arguments, **named)

    recipes = [replace(RECIPE, seed=seed, max_steps=1, eval_steps=0) for seed in range(4)]
    joint = Sweep([partial(Trainer, loaded, recipe, ROWS) for recipe in recipes])
    loaded.model.base_model.forward = counted
    joint.train()
    assert sum(batches) == 16 and len(batches) <= 2


def test_a_resumed_sweep_is_bit_for_bit_the_same(tmp_path):
    straight = sweep(tiny.loaded()).train()
    with pytest.raises(Stopped) as stopped:
        sweep(
            tiny.loaded(), state_folder=tmp_path, report=lambda number, progress: progress.step == 3
        ).train()
    assert stopped.value.step == 3
    torch.manual_seed(999)
    later = []
    again = sweep(
        tiny.loaded(), state_folder=tmp_path, report=lambda *told: later.append(told[1].step)
    )
    resumed = again.train()
    assert sorted(set(later)) == [4, 5, 6]
    for one, other in zip(resumed, straight, strict=True):
        assert torch.equal(one.tensor, other.tensor)
    with pytest.raises(TrainingFailed, match="another sweep"):
        sweep(tiny.loaded(), VARIANTS[1:3], state_folder=tmp_path)


def test_a_variant_that_diverges_leaves_the_others_alone(tmp_path):
    loaded = tiny.loaded()
    recipes = [RECIPE, replace(RECIPE, seed=9)]
    lone = made(loaded, recipes[1]).train()

    def broken(folder=None):
        joint = sweep(loaded, recipes, state_folder=folder)
        with torch.no_grad():
            joint.trainers[0].encoder.embedding.weight.fill_(float("nan"))
        return joint

    joint = broken(tmp_path)
    nothing, prefix = joint.train()
    assert nothing is None and joint.failures[0].code == "loss_not_finite"
    torch.testing.assert_close(prefix.tensor, lone.tensor, rtol=2e-3, atol=2e-4)
    again = sweep(loaded, recipes, state_folder=tmp_path)  # after the end, read again
    assert again.failures[0].code == "loss_not_finite"
    assert torch.equal(again.train()[1].tensor, prefix.tensor)
    with pytest.raises(TrainingFailed) as failed:
        both = broken()
        with torch.no_grad():
            both.trainers[1].encoder.embedding.weight.fill_(float("nan"))
        both.train()
    assert failed.value.code == "loss_not_finite"


def test_each_variant_ends_by_its_own_early_stopping():
    recipe = replace(RECIPE, max_steps=8, eval_steps=1, early_stopping=2)
    recipes = [recipe, replace(recipe, seed=9)]
    measured = [[3.0, 2.0, 2.5, 2.6, 1.0], [5.0, 4.0, 3.0, 2.0, 2.1, 1.9, 1.8, 1.7]]

    def watched(recipe, losses):
        trainer, left = made(tiny.loaded(), recipe), iter(losses)
        trainer._validation = lambda prefix: next(left)
        return trainer

    joint = Sweep([partial(watched, *each) for each in zip(recipes, measured, strict=True)])
    prefixes = joint.train()
    assert [trainer.step for trainer in joint.trainers] == [4, 8]
    assert [prefix.metadata["step"] for prefix in prefixes] == [2, 8]
    for each, prefix in zip(zip(recipes, measured, strict=True), prefixes, strict=True):
        lone = watched(*each).train()
        torch.testing.assert_close(prefix.tensor, lone.tensor, rtol=2e-3, atol=2e-4)
