"""What an evaluation will do is decided and checked once."""

import pytest
from django.core.exceptions import ValidationError
from django.utils import timezone

from chat.models import Checkpoint
from evaluation.models import EvaluationRun
from evaluation.plan import create_evaluation
from portal.models import Run
from tuning.datasets import editing
from tuning.models import TuningRun

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]


def test_the_plan_is_frozen_and_names_what_it_reads(member, dataset, checkpoint, adapter):
    run = create_evaluation(
        member, dataset=dataset, checkpoint=checkpoint, adapter=adapter, max_examples=5
    )
    entry = dataset.current.splits["validation"]
    assert run.recipe == {
        "dataset": {
            "id": dataset.pk,
            "name": "sums",
            "version": 2,
            "split": "validation",
            "sha256": entry["sha256"],
            "rows": 8,
        },
        "rows": 5,
        "checkpoint": {
            "id": checkpoint.pk,
            "name": "tiny",
            "fingerprint": checkpoint.fingerprint,
        },
        "decoding": "greedy",
        "seed": 42,
        "quantization_bit": None,
        "max_source_length": 64,
        "max_target_length": 64,
        "adapter": {"name": "tuned", "sha256": adapter.sha256, "pre_seq_len": 4},
    }
    assert (run.kind, run.queue, run.status, run.total) == (
        Run.Kind.EVALUATION,
        "gpu",
        "queued",
        5,
    )
    assert (
        create_evaluation(member, dataset=dataset, checkpoint=checkpoint, split="train").total == 12
    )
    assert (
        create_evaluation(member, dataset=dataset, checkpoint=checkpoint, max_examples=10**6).total
        == 8
    )


def test_the_bare_checkpoint_goes_first_and_only_once(
    member, other_member, dataset, checkpoint, adapter
):
    plan = {"dataset": dataset, "checkpoint": checkpoint, "adapter": adapter}
    first = create_evaluation(member, **plan)
    base = first.baseline
    assert base.adapter is None and base.pk < first.pk and base.recipe["rows"] == 8
    assert create_evaluation(member, **plan).baseline == base
    assert create_evaluation(member, **plan, max_examples=3).baseline != base  # other rows
    assert create_evaluation(member, **plan, decoding="upstream").baseline != base
    assert create_evaluation(member, **plan, with_baseline=False).baseline is None
    # the same weights and rows under other names
    checkpoint.name, dataset.name = "renamed", "also renamed"
    checkpoint.save(), dataset.save()
    assert create_evaluation(member, **plan).baseline == base
    # what one cannot see is not shared
    assert create_evaluation(other_member, **plan).baseline.owner == other_member
    Run.objects.filter(pk=base.pk).update(status=Run.Status.FAILED)
    assert create_evaluation(member, **plan).baseline != base


def test_lengths_are_those_of_the_adapters_tuning(member, dataset, checkpoint, adapter):
    adapter.run = TuningRun.objects.create(
        owner=member,
        kind=Run.Kind.TUNING,
        name="r",
        dataset_version=dataset.current,
        checkpoint=checkpoint,
        recipe={"max_source_length": 40, "max_target_length": 20},
    )
    run = create_evaluation(member, dataset=dataset, checkpoint=checkpoint, adapter=adapter)
    for recipe in (run.recipe, run.baseline.recipe):
        assert (recipe["max_source_length"], recipe["max_target_length"]) == (40, 20)


def test_every_problem_is_told_at_once(member, dataset, checkpoint, adapter):
    other = Checkpoint.objects.create(name="other", path="x", fingerprint="y")
    with pytest.raises(ValidationError) as caught:
        create_evaluation(
            member,
            dataset=dataset,
            checkpoint=other,
            adapter=adapter,
            decoding="beam",
            max_examples=0,
            split="nope",
            max_source_length=0,
            max_target_length=10**6,
            seed=-1,
        )
    assert set(caught.value.message_dict) == {
        "adapter",
        "decoding",
        "max_examples",
        "split",
        "max_source_length",
        "max_target_length",
        "seed",
    }
    with pytest.raises(ValidationError) as caught:  # the tiny model's context is 256
        create_evaluation(
            member,
            dataset=dataset,
            checkpoint=checkpoint,
            max_source_length=200,
            max_target_length=200,
        )
    assert set(caught.value.message_dict) == {"max_target_length"}
    assert not EvaluationRun.objects.exists()


def test_a_deleted_dataset_cannot_be_evaluated(member, dataset, checkpoint):
    dataset.deleted_at = timezone.now()
    with pytest.raises(ValidationError) as caught:
        create_evaluation(member, dataset=dataset, checkpoint=checkpoint)
    assert "dataset" in caught.value.message_dict


def test_after_an_edit_the_base_is_asked_anew_where_its_rows_have_changed(
    member, dataset, checkpoint, adapter
):
    plan = {"dataset": dataset, "checkpoint": checkpoint, "adapter": adapter}
    base = create_evaluation(member, **plan).baseline
    line = editing.line_of("another", "row")
    editing.change_rows(dataset, "train", base=dataset.current, added=[line])
    dataset.refresh_from_db()
    assert create_evaluation(member, **plan).baseline == base  # the validation rows are the same
    editing.change_rows(dataset, "validation", base=dataset.current, replaced={1: line})
    dataset.refresh_from_db()
    changed = create_evaluation(member, **plan).baseline
    assert (
        changed != base and changed.recipe["dataset"]["sha256"] != base.recipe["dataset"]["sha256"]
    )
