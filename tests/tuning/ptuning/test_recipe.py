"""Hyper-parameters: limits and the learning rate over time, against transformers' schedules."""

import pytest
import torch
from transformers import get_scheduler

from tuning.ptuning.recipe import Recipe


def test_the_defaults_are_upstreams_train_sh():
    recipe = Recipe()
    assert recipe.problems() == []
    assert (
        recipe.pre_seq_len,
        recipe.learning_rate,
        recipe.max_steps,
        recipe.samples_per_step,
    ) == (
        128,
        2e-2,
        3000,
        16,
    )


def test_every_problem_is_found_at_once():
    recipe = Recipe(
        pre_seq_len=0,
        learning_rate="fast",
        max_steps=2.5,
        seed=True,
        quantization_bit=3,
        prefix_projection=1,
        lr_scheduler_type="sawtooth",
        max_grad_norm=float("nan"),
    )
    assert {(problem.field, problem.code) for problem in recipe.problems()} == {
        ("pre_seq_len", "out_of_range"),
        ("learning_rate", "not_a_number"),
        ("max_steps", "not_a_number"),
        ("seed", "not_a_number"),
        ("max_grad_norm", "out_of_range"),
        ("quantization_bit", "not_a_choice"),
        ("prefix_projection", "not_a_choice"),
        ("lr_scheduler_type", "not_a_choice"),
    }


@pytest.mark.parametrize("changes", [{"per_device_train_batch_size": 1024}, {"warmup_steps": 3000}])
def test_values_that_do_not_go_together(changes):
    assert len(Recipe(**changes).problems()) == 1


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"devices": 2}, ("devices", "beside_on_several")),
        ({"method": "lora"}, ("beside", "not_with_method")),
        ({"method": "full"}, ("beside", "not_with_method")),
    ],
)
def test_only_a_prefix_on_one_device_learns_beside_others(changes, problem):
    (found,) = Recipe(beside="a" * 64, **changes).problems()
    assert (found.field, found.code) == problem
    assert Recipe(**changes).problems() == []


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_learning_rate_follows_transformers(schedule, warmup):
    recipe = Recipe(
        learning_rate=0.5, max_steps=20, warmup_steps=warmup, lr_scheduler_type=schedule
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(20):
        assert recipe.learning_rate_at(step) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-12
        )
        optimizer.step()
        scheduler.step()
