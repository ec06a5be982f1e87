"""Weights that learn: loss and gradients against transformers', LoRA against peft and torch by
hand, and a resume that is an uninterrupted run.
"""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from chat.engine.loading import load
from tests.support import tiny_chatglm
from tests.support import tiny_training as tiny
from tuning.ptuning import loss as loss_module
from tuning.ptuning.batches import MicroBatch, rows_of_step, token_weights
from tuning.ptuning.encoded import Encoded
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.trainer import Stopped, TrainingFailed
from tuning.weights import lora
from tuning.weights.loss import WeightsLoss
from tuning.weights.trainer import WeightsTrainer

CPU = torch.device("cpu")
FULL = Recipe(
    method="full",
    learning_rate=1e-3,
    max_steps=4,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_source_length=40,
    max_target_length=24,
    logging_steps=2,
    save_steps=2,
    seed=7,
)
LORA = replace(FULL, method="lora", learning_rate=1e-2, lora_r=4, lora_alpha=8)


def rows_of(loaded, count=5):
    encoded = Encoded(tiny.examples(count), loaded.prompter, 40, 24)
    return [encoded[row] for row in range(count)]


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind, slices", [("qwen2", False), ("qwen2", True), ("gemma3", False)])
def test_loss_and_gradients_are_transformers(kind, slices, monkeypatch):
    """Tied and untied output layers, in one piece and in slices."""
    if slices:
        monkeypatch.setitem(loss_module.LOGITS_BYTES, "cpu", 4 * 272 * 3)
    changes = {"tie_word_embeddings": True} if kind == "qwen2" else {}
    loaded = tiny.loaded(kind, **changes)
    loaded.model.requires_grad_(True)
    theirs = tiny.model(kind, **changes).eval()
    rows = rows_of(loaded)
    total = 0.0
    for ids, labels in rows:
        out = theirs(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        (out.loss / len(rows)).backward()
        total += out.loss.item() / len(rows)
    batch = MicroBatch.of(rows, token_weights([labels for _, labels in rows], 1), 257, CPU)
    loss = WeightsLoss(loaded.model, batch.input_ids[:1])
    assert loss._is_plain
    value = loss(batch, None, batch.weights)
    value.backward()
    assert value.item() == pytest.approx(total, rel=1e-5)
    for (name, mine), other in zip(
        loaded.model.named_parameters(), theirs.parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_full_learns_as_a_plain_loop_does():
    """The same rows, weights and rates as a loop over transformers' own loss with AdamW."""
    loaded, theirs = tiny.loaded(), tiny.model().eval()
    trainer = WeightsTrainer(loaded, FULL, tiny.examples())
    trainer.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    encoded = Encoded(tiny.examples(), loaded.prompter, 40, 24)
    for step in range(FULL.max_steps):
        rows = [encoded[row] for row in rows_of_step(step, 4, len(encoded), FULL.seed)]
        weights = token_weights([labels for _, labels in rows], 2)
        optimizer.zero_grad()
        for (ids, labels), weight in zip(rows, weights, strict=True):
            ids, labels = torch.tensor([ids]), torch.tensor(labels[1:])
            logits = theirs(input_ids=ids).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            (loss * weight).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), FULL.max_grad_norm)
        optimizer.param_groups[0]["lr"] = FULL.learning_rate_at(step)
        optimizer.step()
    assert trainer.trainable_parameters == sum(one.numel() for one in theirs.parameters())
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(
            loaded.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("recipe", [FULL, LORA], ids=["full", "lora"])
def test_a_resumed_run_is_an_uninterrupted_one(recipe, tmp_path):
    recipe = replace(recipe, lora_dropout=0.2, kl_weight=0.5, kl_share=0.5, eval_steps=1)
    options = {"general_prompts": ["ab", "cd"], "validation": tiny.examples(3)}

    def trainer(report=None):
        return WeightsTrainer(
            tiny.loaded(), recipe, tiny.examples(), tmp_path / "state", report, **options
        )

    told = []
    whole = WeightsTrainer(tiny.loaded(), recipe, tiny.examples(), None, told.append, **options)
    expected = weights_of(whole.train().merge().model)
    assert all(progress.validation and progress.divergence is not None for progress in told)
    with pytest.raises(Stopped):
        trainer(lambda progress: progress.step == 3).train()
    again = trainer()
    assert again.step == 3
    found = weights_of(again.train().merge().model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(TrainingFailed, match="recipe"):
        WeightsTrainer(
            tiny.loaded(), replace(recipe, seed=8), tiny.examples(), tmp_path / "state", **options
        )


def test_lora_is_pefts(tmp_path):
    """What is saved for peft gives, on the bare base, the merged model's logits."""
    base = tiny.write(tmp_path / "base")
    trainer = WeightsTrainer(load(base, device="cpu"), LORA, tiny.examples())
    assert trainer.trainable_parameters < 0.5 * sum(
        one.numel() for one in trainer.loaded.model.parameters()
    )
    trainer.train().save(tmp_path / "checkpoint", {"source": "run 1"})
    theirs = PeftModel.from_pretrained(
        load(base, device="cpu").model, tmp_path / "checkpoint" / "lora"
    ).eval()
    merged, ids = load(tmp_path / "checkpoint", device="cpu"), torch.arange(40)[None]
    with torch.no_grad():
        expected, bare = theirs(input_ids=ids).logits, load(base, device="cpu").model(ids).logits
        found = merged.model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - bare).abs().max() > 1e-2
    assert merged.fingerprint != load(base, device="cpu").fingerprint
    source = json.loads((tmp_path / "checkpoint" / "source.json").read_text())
    assert source == {"source": "run 1"}


def test_loras_modules_are_the_familys(tmp_path):
    assert lora.targets(tiny.model()) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    chatglm = load(tiny_chatglm.tiny_folder(tmp_path / "glm"), device="cpu").model
    assert "query_key_value" in lora.targets(chatglm) and "lm_head" not in lora.targets(chatglm)
    assert lora.targets(tiny.model(), " v_proj, q_proj") == ["q_proj", "v_proj"]
    with pytest.raises(TrainingFailed, match="nothing_proj") as failed:
        lora.targets(tiny.model(), "q_proj,nothing_proj")
    assert failed.value.code == "lora_targets_unknown"


def test_half_precision_is_computed_and_stored_but_not_learnt_in(tmp_path):
    """bf16: the forward; the weights and Adam's moments stay float32, the checkpoint is its base's
    precision.
    """
    tiny.model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    loaded = load(tmp_path / "base", device="cpu", dtype=torch.float32)
    dtypes = set()
    loaded.model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda layer, given, out: dtypes.add(out.dtype) if torch.is_grad_enabled() else None
    )
    trainer = WeightsTrainer(loaded, replace(FULL, precision="bfloat16"), tiny.examples())
    trained = trainer.train()
    assert dtypes == {torch.bfloat16}
    assert {one.dtype for one in loaded.model.parameters()} == {torch.float32}
    moments = trained._optimizer.state_dict()["state"][0]
    assert moments["exp_avg"].dtype == torch.float32
    trained.save(tmp_path / "made", {})
    stored = load(tmp_path / "made", device="cpu", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(
            trained.loaded.model.parameters(), stored.model.parameters(), strict=True
        )
    )


def test_a_loss_that_is_no_number_ends_the_run():
    loaded = tiny.loaded()

    def break_it(progress):
        loaded.model.lm_head.weight.data.fill_(float("nan"))

    with pytest.raises(TrainingFailed, match="step 2") as failed:
        WeightsTrainer(loaded, FULL, tiny.examples(), None, break_it).train()
    assert failed.value.code == "loss_not_finite"


def test_early_stopping_returns_the_best_steps_weights(tmp_path):
    recipe = replace(FULL, learning_rate=0.5, max_steps=12, eval_steps=1, early_stopping=2)
    seen = {}
    loaded = tiny.loaded()

    def report(progress):
        seen[progress.step] = (progress.validation, weights_of(loaded.model))

    trainer = WeightsTrainer(
        loaded, recipe, tiny.examples(), None, report, validation=tiny.examples(3)
    )
    trained = trainer.train()
    best = min(seen, key=lambda step: seen[step][0])
    assert trained.best_step == best < max(seen) < 12
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, seen[best][1][name])
