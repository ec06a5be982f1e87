"""The loss on rows that are not learnt from, stopping by it, and steps that can be served."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from chat.engine import adapters
from chat.engine.request import AdapterRef
from tests.support import tiny_training as tiny
from tests.tuning.ptuning.test_trainer import RECIPE
from tuning.ptuning.prefix import TrainingPrefixCache
from tuning.ptuning.proof import prove
from tuning.ptuning.trainer import Stopped, Trainer

HELD_OUT = [{"prompt": f"new {n}", "response": "答" * n + "x", "history": []} for n in range(1, 5)]
WATCHED = replace(RECIPE, eval_steps=2)


def seen_by(trainer):
    told = []
    trainer._report = told.append
    return trainer.train(), told


def test_the_validation_loss_is_the_models_own_on_the_prefix_of_that_step():
    loaded, kept = tiny.loaded(), {}
    trainer = Trainer(loaded, WATCHED, tiny.examples(), validation=HELD_OUT)
    prefix, told = seen_by(trainer)
    assert [p.step for p in told if p.validation is not None] == [2, 4, 6]
    total, count = 0.0, 0
    for row in HELD_OUT:
        ids, labels = loaded.prompter.training_ids(
            [{"role": "user", "content": row["prompt"]}], row["response"], 40, 24
        )
        logits = loaded.model(
            input_ids=torch.tensor([ids]), past_key_values=TrainingPrefixCache(prefix.tensor, 1)
        ).logits[0, :-1]
        wanted = torch.tensor(labels[1:])
        total += cross_entropy(logits, wanted, reduction="sum").item()
        count += (wanted != -100).sum().item()
    assert told[-1].validation == pytest.approx(total / count, rel=1e-5)
    assert not kept


def test_watching_changes_nothing_of_what_is_learnt():
    plain = Trainer(tiny.loaded(), replace(RECIPE, prefix_dropout=0.2), tiny.examples()).train()
    watched = replace(WATCHED, prefix_dropout=0.2)
    again = Trainer(tiny.loaded(), watched, tiny.examples(), validation=HELD_OUT).train()
    assert torch.equal(plain.tensor, again.tensor)


# a rate at which the tiny model's validation loss turns around
STOPPING = replace(RECIPE, eval_steps=1, early_stopping=2, max_steps=60, learning_rate=0.5)


def test_a_run_ends_when_it_gets_no_better_and_gives_its_best_step(tmp_path):
    kept = {}
    trainer = Trainer(
        tiny.loaded(),
        replace(STOPPING, save_steps=1),
        tiny.examples(4),
        tmp_path,
        validation=HELD_OUT,
        keep=lambda step, prefix: kept.__setitem__(step, prefix.tensor.clone()),
    )
    prefix, told = seen_by(trainer)
    losses = [p.validation for p in told]
    best = 1 + losses.index(min(losses))
    assert told[-1].step == best + 2 < 60
    assert trainer.best_step == prefix.metadata["step"] == best
    assert torch.equal(prefix.tensor, kept[best])
    assert not torch.equal(prefix.tensor, kept[best + 2])
    again = Trainer(
        tiny.loaded(),
        replace(STOPPING, save_steps=1),
        tiny.examples(4),
        tmp_path,
        lambda progress: pytest.fail("trained"),
        validation=HELD_OUT,
    )
    assert torch.equal(again.train().tensor, prefix.tensor)


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_resumed_run_stops_where_an_undisturbed_one_does(tmp_path, stop_at):
    straight = Trainer(tiny.loaded(), STOPPING, tiny.examples(4), validation=HELD_OUT)
    expected, told = seen_by(straight)
    with pytest.raises(Stopped):
        Trainer(
            tiny.loaded(),
            STOPPING,
            tiny.examples(4),
            tmp_path,
            lambda progress: progress.step == min(stop_at, told[-1].step - 1),
            validation=HELD_OUT,
        ).train()
    resumed = Trainer(tiny.loaded(), STOPPING, tiny.examples(4), tmp_path, validation=HELD_OUT)
    found, later = seen_by(resumed)
    assert torch.equal(found.tensor, expected.tensor)
    assert later[-1] == replace(told[-1], samples_per_second=later[-1].samples_per_second)


def served(prefix, folder):
    return AdapterRef(adapters.save(prefix, folder), str(folder))


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_what_is_served_is_what_was_trained_and_another_prefix_is_told(tmp_path, kind):
    loaded = tiny.loaded(kind)
    trainer = Trainer(loaded, replace(RECIPE, max_steps=20), tiny.examples())
    prefix = trainer.train()
    prompts = [
        loaded.prompter.prompt_ids([{"role": "user", "content": row["prompt"]}], 40)
        for row in HELD_OUT
    ]
    proof = prove(loaded, prefix.tensor, served(prefix, tmp_path / "right"), prompts)
    assert proof.holds and proof.same == proof.prompts == 4 and proof.tokens > 4
    assert proof.gap < 1e-3
    upside_down = replace(prefix, tensor=prefix.tensor.flip(1))  # keys and values exchanged
    wrong = prove(loaded, prefix.tensor, served(upside_down, tmp_path / "wrong"), prompts)
    assert not wrong.holds and wrong.gap > 0.01
    assert wrong.as_dict()["holds"] is False
