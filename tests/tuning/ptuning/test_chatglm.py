"""The trainer on ChatGLM against what upstream's code computed: losses, gradient norms, learning
rates and trained prefixes.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from chat.engine.adapters import load, save
from chat.engine.loading import from_parts
from chat.engine.loading import load as load_checkpoint
from chat.engine.prompts import IGNORED
from tests.support import tiny_training as tiny
from tests.support.tiny_chatglm import DATA, tiny_folder
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.trainer import Trainer

STEM = "transformer.prefix_encoder."
RECIPE = Recipe(
    pre_seq_len=8,
    learning_rate=2e-2,
    max_steps=5,
    max_source_length=32,
    max_target_length=32,
    logging_steps=1,
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_checkpoint(tiny_folder(tmp_path_factory.mktemp("chatglm") / "tiny"), device="cpu")


@dataclass
class Recorded:
    """Gives out recorded token ids for examples whose prompt is their row number."""

    ids: np.ndarray
    labels: np.ndarray

    def training_ids(self, messages, response, max_source_length, max_target_length):
        row = int(messages[-1]["content"])
        length = int((self.ids[row] != 3).sum())
        return self.ids[row][:length].tolist(), self.labels[row][:length].tolist()


class WithLeftOver(Trainer):
    """Adds `left_over` gradients to those of the first step."""

    def _accumulate(self, rows, general):
        losses = super()._accumulate(rows, general)
        if self.left_over is not None and self.step == 0:
            for parameter, gradient in zip(self.encoder.parameters(), self.left_over, strict=True):
                parameter.grad += gradient
        return losses


@pytest.fixture(params=["prefix_noproj", "prefix_proj"])
def train(request, loaded):
    """train(recipe) -> (what was reported, the trainer) from the recorded initial prefix on the
    recorded rows.
    """
    golden = np.load(DATA / request.param / "golden.npz")

    def run(recipe: Recipe, left_over=None):
        recipe = replace(recipe, prefix_projection=request.param == "prefix_proj")
        prompter = Recorded(golden["train_input_ids"], golden["train_labels"])
        rows = [{"prompt": str(row), "response": "recorded", "history": []} for row in range(4)]
        seen = []
        trainer = WithLeftOver(replace(loaded, prompter=prompter), recipe, rows, report=seen.append)
        trainer.left_over = left_over
        names = [key for key in golden.files if key.startswith("w0:")]
        trainer.encoder.load_state_dict(
            {name[3:].removeprefix(STEM): torch.from_numpy(golden[name]) for name in names}
        )
        trainer.train()
        return seen, trainer

    run.folder = DATA / request.param
    return run


WHOLE_BATCHES = replace(
    RECIPE,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
)


def slack(trainer) -> float:
    """AdamW makes a full step of the sign of a gradient that all but vanishes, which the projection
    has.
    """
    return 5e-3 if trainer.recipe.prefix_projection else 1e-4


def same_weights(trainer, golden):
    for name, parameter in trainer.encoder.named_parameters():
        expected = torch.from_numpy(golden[f"w5:{STEM}{name}"])
        assert (parameter - expected).norm() <= slack(trainer) * expected.norm(), name


def test_five_steps_on_whole_batches(train):
    seen, trainer = train(WHOLE_BATCHES)
    golden = np.load(train.folder / "golden.npz")
    assert [progress.loss for progress in seen] == pytest.approx(
        golden["adamw5_batch_losses"].tolist(), rel=2e-5
    )
    same_weights(trainer, golden)


def test_five_steps_as_train_sh_takes_them(train):
    """One example at a time, accumulated; clipped; the rate falls in a line to 0.

    The recording did not clear the gradients that its five steps on whole batches had left, so its
    first step adds to them.
    """
    left_over = [parameter.grad for parameter in train(WHOLE_BATCHES)[1].encoder.parameters()]
    recipe = replace(RECIPE, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    seen, trainer = train(recipe, left_over)
    golden = np.load(train.folder / "golden_trainer_style.npz")
    assert [progress.loss for progress in seen] == pytest.approx(
        golden["losses"].tolist(), rel=slack(trainer) / 5
    )
    assert [progress.gradient_norm for progress in seen] == pytest.approx(
        golden["grad_norms"].tolist(), rel=slack(trainer)
    )
    assert [progress.learning_rate for progress in seen] == pytest.approx(
        golden["lrs"].tolist(), rel=1e-6
    )
    same_weights(trainer, golden)


def test_examples_of_text_train_on_the_checkpoint_itself(loaded, tmp_path):
    """Through the tokenizer and prompter: <sop> is the first label, positions do not shift, and the
    result is an adapter.
    """
    recipe = replace(
        RECIPE,
        per_device_train_batch_size=4,
        max_steps=3,
        max_source_length=40,
        gradient_accumulation_steps=1,
    )
    trainer = Trainer(loaded, recipe, tiny.examples(9))
    ids, labels = trainer._examples[0]
    first = next(index for index, label in enumerate(labels) if label != IGNORED)
    config = loaded.model.config
    assert (
        ids[first - 1 : first + 1] == [config.gmask_token_id, config.bos_token_id]
        and ids[-1] == config.eos_token_id
    )
    save(trainer.train(), tmp_path)
    adapter = load(tmp_path)
    assert adapter.tensor.shape == (4, 2, 4, 8, 16) and adapter.shifts_positions is False
    assert adapter.checkpoint_fingerprint == loaded.fingerprint and adapter.metadata["step"] == 3


def test_a_quantised_base_trains(tmp_path):
    loaded = load_checkpoint(tiny_folder(tmp_path / "int4", "int4"), device="cpu")
    recipe = replace(RECIPE, max_steps=8, gradient_accumulation_steps=4, max_source_length=40)
    seen = []
    Trainer(loaded, recipe, tiny.examples(4), report=seen.append).train()
    assert seen[-1].loss < seen[0].loss


def test_the_embedding_used_as_output_layer_is_a_plain_one(loaded):
    trainer = Trainer(loaded, replace(RECIPE, max_source_length=40), tiny.examples(2))
    assert trainer.loss._is_plain and from_parts(loaded.model, loaded.tokenizer).layers == 4
