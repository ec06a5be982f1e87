"""Sweeps: planned, refused, written as text, carried out."""

import io
import json

import pytest
from django.core.exceptions import ValidationError
from django.utils.translation import override

from chat.checkpoints import memory
from chat.engine import adapters
from chat.registry import register_checkpoint
from tests.evaluation.test_work import QuietHeartbeat
from tests.support import tiny_training as tiny
from tests.support.page_rows import text_of
from tuning import sweeps
from tuning.apps import _going_on_from
from tuning.datasets import store
from tuning.models import TuningMetric, TuningRun
from tuning.plan import create_run
from tuning.work import TuningWork

SHORT = {
    "pre_seq_len": 4,
    "learning_rate": 5e-2,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_source_length": 40,
    "max_target_length": 24,
    "logging_steps": 2,
    "save_steps": 2,
    "init": "random",
    "kl_weight": 0.0,
}
SWEEP = [{"seed": 1}, {"seed": 1, "learning_rate": 1e-7}, {"init": "zero", "pre_seq_len": 6}]


@pytest.fixture
def dataset(member, data_dir):
    """Rows to train on and rows to find the best by."""
    files = []
    for rows in (tiny.examples(8), tiny.examples(10)[8:]):
        text = "\n".join(json.dumps({"q": row["prompt"], "a": row["response"]}) for row in rows)
        files.append(io.BytesIO(text.encode()))
    for file in files:
        file.name = "rows.json"
    return store.ingest(
        files[0],
        name="rows",
        owner=member,
        validation=files[1],
        prompt_column="q",
        response_column="a",
    )


def refusals(call, *arguments, **named) -> list[str]:
    with pytest.raises(ValidationError) as refused:
        call(*arguments, **named)
    return refused.value.message_dict["sweep"]


def test_a_sweep_is_carried_out_and_its_best_is_the_runs_own(
    member, dataset, tmp_path, client, monkeypatch
):
    base = register_checkpoint(tiny.write(tmp_path / "tiny"), "tiny")
    planned = create_run(member, dataset=dataset, checkpoint=base, name="s", sweep=SWEEP, **SHORT)
    assert planned.recipe["sweep"] == SWEEP and planned.recipe["eval_steps"] == 4
    work = TuningWork(planned.pk, lambda line: None)
    work.work(QuietHeartbeat())
    run = TuningRun.objects.get(pk=planned.pk)
    losses = [one["validation_loss"] for one in run.variants]
    best = losses.index(min(losses))
    assert len(losses) == 3 and len(set(losses)) == 3
    assert [one["best"] for one in run.variants] == [number == best for number in range(3)]
    made = {adapter.pk: adapter for adapter in run.adapters.all()}
    assert len(made) == 3 and run.result().pk == run.variants[best]["adapter"]
    assert run.result().name == "s" and run.validation_loss == losses[best]
    for number, one in enumerate(run.variants):
        prefix = adapters.load(made[one["adapter"]].path)
        recipe = prefix.metadata["recipe"]
        assert prefix.metadata["variant"] == number + 1
        assert {name: recipe[name] for name in SWEEP[number]} == SWEEP[number]
    assert run.proof["holds"] and run.peak_memory > 1 << 20
    assert TuningMetric.objects.filter(run=run, step=4).count() == 3

    client.force_login(member)
    shown = client.get(f"/tuning/{run.pk}/")
    labels = [curve["label"] for curve in shown.context["chart"]["others"]]
    assert len(labels) == 2 and all("=" in label for label in labels)
    assert "learning_rate=1e-07" in text_of(shown)
    told = client.get(f"/api/v1/tuning-runs/{run.pk}/").json()
    assert told["variants"] == run.variants and told["adapter"] == run.result().pk
    # after a kill between the last step and the row: the same adapters, none twice
    TuningRun.objects.filter(pk=run.pk).update(variants=[])
    TuningWork(run.pk, lambda line: None).work(QuietHeartbeat())
    assert set(run.adapters.values_list("pk", flat=True)) == set(made)
    again = client.get(f"/tuning/new/?like={run.pk}").context["form"]["sweep"].value()
    assert sweeps.parsed(again) == SWEEP


@pytest.mark.parametrize(
    "sweep, told",
    [
        ([{"seed": 1}], "2 to 8"),
        ([{"seed": number} for number in range(9)], "2 to 8"),
        ("seed", "2 to 8"),
        ([{"seed": 1}, {"max_steps": 9}], "Variant 2: max_steps cannot differ"),
        ([{"seed": 1}, {"learning_rate": 9}], "Variant 2: learning_rate: Must lie between"),
        ([{"seed": 1}, {"seed": 1}], "Variant 2: is the same as variant 1"),
        ([{"seed": 1}, ["seed"]], "Variant 2: must be an object"),
        ([{"seed": 1}, {"init_text": 5}], "Variant 2: init_text must be text"),
        ([{"seed": 1}, {"init": ["zero"]}], "Variant 2: init must be one value"),
        ([{"seed": 1}, {"init": "adapter", "init_adapter": "nobody"}], "does not exist"),
        ([{"seed": 1}, {"pre_seq_len": 500}], "between 1 and 256"),
    ],
)
def test_what_no_sweep_can_be_is_said_before_it_runs(member, dataset, checkpoint, sweep, told):
    named = {"dataset": dataset, "checkpoint": checkpoint, "sweep": sweep, **SHORT}
    with override("en"):
        (message,) = refusals(create_run, member, **named)
    assert told in message and not TuningRun.objects.exists()


def test_a_sweep_needs_rows_to_find_its_best_by(member, make_dataset, checkpoint):
    named = {"dataset": make_dataset(member), "checkpoint": checkpoint, "sweep": SWEEP, **SHORT}
    with override("en"):
        assert "validation rows" in refusals(create_run, member, **named)[0]


def test_a_sweep_that_does_not_fit_in_memory_is_refused(
    member, dataset, checkpoint, client, monkeypatch, settings
):
    settings.LANGUAGE_CODE = "en"
    checkpoint.description |= {
        "parameters": 1_000_000, "layers": 4, "hidden_size": 64, "kv_heads": 4, "head_dim": 16,
        "vocabulary": 1000,
    }  # fmt: skip
    checkpoint.save()
    # a prefix token is 2 * 4 * 4 * 16 numbers of 24 bytes: 12 KiB
    small = memory.Machine("cpu", (400 << 20) + 5_000_000)
    monkeypatch.setattr(memory, "machine", lambda: small)
    named = {"dataset": dataset, "checkpoint": checkpoint, **SHORT}
    create_run(member, sweep=[{"seed": 1}, {"seed": 2}], **named)
    large = [{"seed": 1, "pre_seq_len": 200}, {"seed": 2, "pre_seq_len": 200}]
    with override("en"):
        told = refusals(create_run, member, sweep=large, **named)[0]
    assert "2 prefixes at once need about" in told
    client.force_login(member)
    client.cookies["django_language"] = "en"
    body = {"dataset": dataset.pk, "checkpoint": checkpoint.pk, "sweep": large, **SHORT}
    answer = client.post(
        "/api/v1/tuning-runs/",
        body,
        content_type="application/json",
        headers={"accept-language": "en"},
    )
    assert answer.status_code == 400 and "prefixes at once" in json.dumps(answer.json())
    form = {name: value for name, value in body.items() if value} | {
        "sweep": "pre_seq_len=200 seed=1\npre_seq_len=200 seed=2",
        "overlong": "truncate", "lr_scheduler_type": "linear", "warmup_steps": 0, "seed": 1,
        "weight_decay": 0, "max_grad_norm": 1, "prefix_dropout": 0, "precision": "auto",
        "kl_weight": 0, "kl_share": 0.25, "eval_steps": 0, "early_stopping": 0, "beside_share": 1,
    }  # fmt: skip
    page = client.post("/tuning/new/", form)
    assert (
        page.status_code == 200 and "2 prefixes at once" in page.context["form"].errors["sweep"][0]
    )


def test_a_sweep_as_people_write_it():
    text = "seed=1, learning-rate=1e-2\n\n  init=prompt init_text='two words' freeze_first=yes\n"
    found = [
        {"seed": 1, "learning_rate": 0.01},
        {"init": "prompt", "init_text": "two words", "freeze_first": True},
    ]
    assert sweeps.parsed(text) == found and sweeps.parsed(sweeps.as_text(found)) == found
    assert sweeps.parsed("seed=x")[0] == {"seed": "x"}, "which the recipe refuses"
    for wrong in ("seed", "seed='1"):
        with override("en"), pytest.raises(ValidationError, match="Variant 1"):
            sweeps.parsed(wrong)


def test_an_adapter_that_a_variant_goes_on_from_stays(member, dataset, checkpoint):
    from chat.models import Adapter

    before = Adapter.objects.create(
        name="old", checkpoint=checkpoint, owner=member, sha256="b" * 64, pre_seq_len=7, folder="x"
    )
    named = {"dataset": dataset, "checkpoint": checkpoint, **SHORT}
    run = create_run(
        member, sweep=[{"seed": 1}, {"init": "adapter", "init_adapter": "old"}], **named
    )
    assert run.recipe["sweep"][1] == {
        "init": "adapter", "init_adapter": "b" * 64, "pre_seq_len": 7,
    }  # fmt: skip
    assert sweeps.variants_of(run.recipe)[1].pre_seq_len == 7
    assert _going_on_from(before)
