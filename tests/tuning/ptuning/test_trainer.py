"""The trainer against peft, against itself in other micro-batches, and across a resume."""

import hashlib
import resource
from dataclasses import replace

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

from chat.engine.adapters import save
from chat.engine.request import LONGEST_PREFIX, AdapterRef
from tests.support import tiny_training as tiny
from tuning.ptuning import loss as loss_module
from tuning.ptuning import training_state
from tuning.ptuning.batches import MicroBatch, front_of_step, token_weights
from tuning.ptuning.loss import PrefixLoss, decoder_layers, gradient_checkpointing
from tuning.ptuning.prefix import PrefixEncoder
from tuning.ptuning.proof import prove
from tuning.ptuning.recipe import Recipe
from tuning.ptuning.trainer import Stopped, Trainer, TrainingFailed

CPU = torch.device("cpu")
RECIPE = Recipe(
    pre_seq_len=4,
    learning_rate=5e-2,
    max_steps=6,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=5,
    max_source_length=40,
    max_target_length=24,
    logging_steps=2,
    save_steps=2,
    seed=7,
)


def encoded(loaded, count=5):
    rows = tiny.examples(count)
    return [
        loaded.prompter.training_ids(
            [{"role": "user", "content": row["prompt"]}], row["response"], 40, 24
        )
        for row in rows
    ]


def gradients(loaded, encoder, rows, weights, **options):
    batch = MicroBatch.of(rows, weights, 257, CPU)
    encoder.zero_grad()
    value = PrefixLoss(loaded.model, batch.input_ids[:1])(
        batch, encoder(), batch.weights, **options
    )
    value.backward()
    return value.item(), {
        name: parameter.grad.clone() for name, parameter in encoder.named_parameters()
    }


@pytest.mark.parametrize(
    "kind, projection",
    [("qwen2", False), ("llama", False), ("llama", True), ("gemma3", False)],
)
def test_loss_and_gradients_are_pefts(kind, projection):
    loaded = tiny.loaded(kind)
    rows = encoded(loaded)
    if kind == "gemma3":  # beyond the window of its local layers, which then miss the prefix
        assert max(len(ids) for ids, _ in rows) > 2 * loaded.windows["sliding_attention"]
    theirs = get_peft_model(
        tiny.model(kind).eval().requires_grad_(False),
        PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=4,
            prefix_projection=projection,
            encoder_hidden_size=32,
        ),
    ).eval()
    names = {"transform.": "trans.", "embedding.": "embedding."}
    encoder = PrefixEncoder(
        pre_seq_len=4,
        layers=3,
        kv_heads=loaded.kv_heads,
        head_dim=8,
        projection=projection,
        hidden_size=32,
    )
    their_encoder = theirs.prompt_encoder["default"]
    for name, parameter in their_encoder.named_parameters():
        if not projection and name.startswith("transform."):
            continue
        mine = names[name.split(".")[0] + "."] + name.split(".", 1)[1]
        encoder.get_parameter(mine).data.copy_(parameter.data)
    total = 0.0
    for ids, labels in rows:  # one by one: peft's own answer to padding is not in question
        out = theirs(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            labels=torch.tensor([labels]),
        )
        (out.loss / len(rows)).backward()
        total += out.loss.item() / len(rows)
    value, mine = gradients(loaded, encoder, rows, token_weights([labels for _, labels in rows], 1))
    assert value == pytest.approx(total, rel=1e-5)
    for name, parameter in their_encoder.named_parameters():
        if projection or name.startswith("embedding."):
            gradient = mine[names[name.split(".")[0] + "."] + name.split(".", 1)[1]]
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


def test_ways_to_the_same_gradient(monkeypatch):
    """Output layer in slices, all logits of the labelled columns, and layers computed twice."""
    loaded = tiny.loaded()
    rows = encoded(loaded)
    weights = token_weights([labels for _, labels in rows], 5)
    encoder = PrefixEncoder(pre_seq_len=4, layers=3, kv_heads=2, head_dim=8)
    value, expected = gradients(loaded, encoder, rows, weights)

    def same():
        again, gradient = gradients(loaded, encoder, rows, weights)
        assert again == pytest.approx(value, rel=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)

    monkeypatch.setitem(loss_module.LOGITS_BYTES, "cpu", 4 * 272 * 3)
    same()
    with gradient_checkpointing(decoder_layers(loaded.model, 3), on=True):
        same()
    assert "forward" not in vars(loaded.model.base_model.layers[0])
    monkeypatch.setattr(PrefixLoss, "_plain", lambda self, probe: False)
    same()


def test_an_output_layer_that_does_more_than_multiply_is_noticed():
    loaded = tiny.loaded()
    probe = torch.tensor([encoded(loaded)[0][0]])
    assert PrefixLoss(loaded.model, probe)._is_plain
    plain = loaded.model.forward

    def capped(*arguments, **named):
        out = plain(*arguments, **named)
        out.logits = 0.1 * torch.tanh(out.logits / 0.1)
        return out

    loaded.model.forward = capped
    assert not PrefixLoss(loaded.model, probe)._is_plain


def checksum(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_only_the_prefix_learns_and_it_learns():
    loaded = tiny.loaded()
    before, seen = checksum(loaded.model), []
    trainer = Trainer(loaded, replace(RECIPE, max_steps=40), tiny.examples(5), report=seen.append)
    start = trainer.kv_prefix().tensor.clone()
    prefix = trainer.train()
    assert checksum(loaded.model) == before
    assert not any(
        parameter.requires_grad or parameter.grad is not None
        for parameter in loaded.model.parameters()
    )
    assert prefix.tensor.shape == (3, 2, 2, 4, 8) and not torch.equal(prefix.tensor, start)
    assert trainer.trainable_parameters == prefix.tensor.numel()
    assert seen[-1].loss < 0.8 * seen[0].loss
    assert [progress.step for progress in seen] == list(range(1, 41))
    logged = [progress.logged for progress in seen if progress.logged is not None]
    assert len(logged) == 20 and logged[0] == pytest.approx((seen[0].loss + seen[1].loss) / 2)
    assert seen[0].learning_rate == 5e-2 and seen[-1].learning_rate == pytest.approx(5e-2 / 40)


def test_the_longest_prefix_is_served_as_it_was_trained(tmp_path):
    loaded = tiny.loaded(max_position_embeddings=4096)
    recipe = replace(RECIPE, pre_seq_len=LONGEST_PREFIX, max_steps=2)
    trainer = Trainer(loaded, recipe, tiny.examples(5))
    start = trainer.kv_prefix().tensor.clone()
    prefix = trainer.train()
    assert (prefix.tensor != start).any((0, 1, 2, 4)).all()  # every one of its positions
    served = AdapterRef(save(prefix, tmp_path), str(tmp_path))
    proof = prove(loaded, prefix.tensor, served, [ids for ids, _ in encoded(loaded)])
    assert proof.holds and proof.same == 5


def test_a_model_that_would_learn_itself_is_refused():
    loaded = tiny.loaded()
    loaded.model.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen"):
        Trainer(loaded, RECIPE, tiny.examples())


def test_micro_batches_do_not_change_what_is_learnt():
    results = [
        Trainer(tiny.loaded(), RECIPE, tiny.examples(), micro_batch_tokens=tokens).train().tensor
        for tokens in (1, 64, 10_000)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


def test_batch_size_and_accumulation_differ_as_upstreams_do():
    """16 x 1 weighs tokens alike, 1 x 16 examples alike: other gradients, unless all answers are
    equally long.
    """
    by_example = Trainer(tiny.loaded(), RECIPE, tiny.examples()).train().tensor
    whole = replace(RECIPE, per_device_train_batch_size=5, gradient_accumulation_steps=1)
    assert not torch.allclose(
        Trainer(tiny.loaded(), whole, tiny.examples()).train().tensor, by_example, atol=1e-3
    )
    rows = [{"prompt": str(number), "response": "equal", "history": []} for number in range(9)]
    torch.testing.assert_close(
        Trainer(tiny.loaded(), whole, rows).train().tensor,
        Trainer(tiny.loaded(), RECIPE, rows).train().tensor,
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "changes", [{}, {"prefix_dropout": 0.3}, {"prefix_projection": True}], ids=str
)
def test_a_resumed_run_is_bit_for_bit_the_same(tmp_path, changes):
    recipe = replace(RECIPE, **changes)
    reports = []
    straight = Trainer(tiny.loaded(), recipe, tiny.examples(), report=reports.append).train()
    with pytest.raises(Stopped) as stopped:
        Trainer(
            tiny.loaded(),
            recipe,
            tiny.examples(),
            tmp_path,
            report=lambda progress: progress.step == 3,
        ).train()
    assert stopped.value.step == 3
    torch.manual_seed(999)  # what another process has in its generators
    later = []
    resumed = Trainer(tiny.loaded(), recipe, tiny.examples(), tmp_path, report=later.append).train()
    assert torch.equal(resumed.tensor, straight.tensor)
    assert [progress.step for progress in later] == [4, 5, 6]
    assert [(p.loss, p.logged, p.gradient_norm) for p in later] == [
        (p.loss, p.logged, p.gradient_norm) for p in reports[3:]
    ]
    assert sorted(entry.name for entry in tmp_path.iterdir())[-1] == "step-00000006"
    again = Trainer(
        tiny.loaded(),
        recipe,
        tiny.examples(),
        tmp_path,
        report=lambda progress: pytest.fail("trained"),
    )
    assert torch.equal(again.train().tensor, straight.tensor)


def test_a_half_written_checkpoint_is_not_read(tmp_path):
    with pytest.raises(Stopped):
        Trainer(
            tiny.loaded(),
            RECIPE,
            tiny.examples(),
            tmp_path,
            report=lambda progress: progress.step == 2,
        ).train()
    (tmp_path / ".unfinished-00000004").mkdir()
    (tmp_path / ".unfinished-00000004" / "state.pt").write_bytes(b"half")
    steps = []
    Trainer(
        tiny.loaded(), RECIPE, tiny.examples(), tmp_path, report=lambda p: steps.append(p.step)
    ).train()
    assert steps == [3, 4, 5, 6]
    assert not list(tmp_path.glob(".unfinished-*")) and (tmp_path / "step-00000006").exists()


@pytest.mark.parametrize("damage", [b"", b"no archive", "half"])
def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path, damage):
    recipe = replace(RECIPE, save_steps=2)
    straight = Trainer(tiny.loaded(), recipe, tiny.examples()).train()
    with pytest.raises(Stopped):
        Trainer(tiny.loaded(), recipe, tiny.examples(), tmp_path, lambda p: p.step == 4).train()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]
    newest = tmp_path / "step-00000004" / "state.pt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    steps = []
    again = Trainer(
        tiny.loaded(), recipe, tiny.examples(), tmp_path, lambda p: steps.append(p.step)
    ).train()
    assert steps == [3, 4, 5, 6] and torch.equal(again.tensor, straight.tensor)
    for state in tmp_path.glob("*/state.pt"):
        state.write_bytes(b"")
    assert Trainer(tiny.loaded(), recipe, tiny.examples(), tmp_path).step == 0, "and begins anew"


def test_a_full_disk_is_told_as_that_and_keeps_what_was_there(tmp_path):
    training_state.save(tmp_path, 1, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # as a disk with so much room
    try:
        with pytest.raises(OSError, match="too large"):
            training_state.save(tmp_path, 2, {"step": 2, "tensor": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    assert training_state.load_newest(tmp_path, torch.device("cpu")) == {"step": 1}


def test_anothers_checkpoint_is_refused(tmp_path):
    Trainer(tiny.loaded(), RECIPE, tiny.examples(), tmp_path).train()
    with pytest.raises(TrainingFailed) as failed:
        Trainer(tiny.loaded(), replace(RECIPE, seed=8), tiny.examples(), tmp_path).train()
    assert failed.value.code == "state_mismatch"


def test_a_loss_that_is_no_number_ends_the_run_with_its_reason():
    loaded = tiny.loaded()
    trainer = Trainer(loaded, RECIPE, tiny.examples())
    with torch.no_grad():
        trainer.encoder.embedding.weight.fill_(float("nan"))
    with pytest.raises(TrainingFailed) as failed:
        trainer.train()
    assert failed.value.code == "loss_not_finite" and "step 1: the loss is nan" in str(failed.value)


def test_what_cannot_be_trained_is_said_before_training():
    for rows, changes, code in [
        ([{"prompt": "a", "response": " ", "history": []}], {}, "no_examples"),
        (tiny.examples(), {"max_source_length": 300}, "does_not_fit"),
    ]:
        with pytest.raises(TrainingFailed) as failed:
            Trainer(tiny.loaded(), replace(RECIPE, **changes), rows)
        assert failed.value.code == code


def test_running_out_of_memory_makes_smaller_micro_batches_then_replays_layers(monkeypatch):
    straight = Trainer(tiny.loaded(), RECIPE, tiny.examples()).train().tensor
    plain, refused = Trainer._accumulate, []

    def scarce(self, rows, general):
        if not self.size.replay:
            refused.append(self.size.tokens)
            raise torch.OutOfMemoryError("no memory")
        return plain(self, rows, general)

    monkeypatch.setattr(Trainer, "_accumulate", scarce)
    result = Trainer(tiny.loaded(), RECIPE, tiny.examples()).train().tensor
    assert refused == sorted(refused, reverse=True) and len(refused) > 2
    torch.testing.assert_close(result, straight, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(
        Trainer,
        "_accumulate",
        lambda self, rows, general: (_ for _ in ()).throw(torch.OutOfMemoryError("none")),
    )
    with pytest.raises(TrainingFailed) as failed:
        Trainer(tiny.loaded(), RECIPE, tiny.examples()).train()
    assert failed.value.code == "out_of_memory"


def test_float16_is_scaled_and_bfloat16_learns_about_the_same():
    exact = Trainer(tiny.loaded(), RECIPE, tiny.examples()).train().tensor
    for dtype in (torch.bfloat16, torch.float16):
        loaded = tiny.loaded()
        loaded.model.to(dtype)
        loaded.dtype = dtype
        trainer = Trainer(loaded, RECIPE, tiny.examples())
        assert trainer._scaler.is_enabled() == (dtype == torch.float16)
        result = trainer.train()
        assert result.tensor.dtype == dtype
        assert (result.tensor.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_a_prefix_learns_behind_another_in_a_share_of_the_steps(tmp_path):
    loaded = tiny.loaded()
    front = torch.randn(3, 2, 2, 3, 8, generator=torch.Generator().manual_seed(5))
    recipe = replace(RECIPE, beside="a" * 64, beside_share=0.5)
    chosen = [front_of_step(step, 1, 0.5, recipe.seed) for step in range(6)]
    assert 0 in chosen and None in chosen
    told = []
    straight = Trainer(loaded, recipe, tiny.examples(), beside=[front], report=told.append)
    lengths = []
    plain = straight.loss

    def watched(batch, prefix, *arguments):
        lengths.append(prefix.shape[3])
        assert prefix.shape[3] == 4 or torch.equal(prefix[:, :, :, :3].detach(), front)
        return plain(batch, prefix, *arguments)

    straight.loss = watched
    prefix = straight.train()
    assert prefix.tensor.shape[3] == 4 and {4, 7} == set(lengths)
    with pytest.raises(Stopped):
        Trainer(
            loaded, recipe, tiny.examples(), tmp_path, lambda p: p.step == 3, beside=[front]
        ).train()
    resumed = Trainer(loaded, recipe, tiny.examples(), tmp_path, beside=[front]).train()
    assert torch.equal(resumed.tensor, prefix.tensor)
    assert not torch.equal(Trainer(loaded, RECIPE, tiny.examples()).train().tensor, prefix.tensor)
    counts = [front_of_step(step, 2, 0.25, 1) for step in range(2000)]
    assert 0.2 < sum(one is not None for one in counts) / 2000 < 0.3
    assert 0.8 < counts.count(0) / counts.count(1) < 1.25
