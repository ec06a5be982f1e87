"""Rows of earlier versions."""

from importlib import import_module

import pytest
from django.apps import apps

from evaluation.comparison import compare
from evaluation.models import EvaluationRun
from evaluation.plan import create_evaluation

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]


def test_a_flat_recipe_of_an_earlier_version_becomes_a_nested_one(
    member, dataset, checkpoint, adapter
):
    run = create_evaluation(
        member, dataset=dataset, checkpoint=checkpoint, adapter=adapter, max_examples=5
    )
    flat = {
        "dataset": "sums",
        "dataset_version": 2,
        "dataset_sha256": run.recipe["dataset"]["sha256"],
        "split": "validation",
        "rows": 5,
        "checkpoint": "tiny",
        "checkpoint_fingerprint": checkpoint.fingerprint,
        "decoding": "greedy",
        "seed": 42,
        "quantization_bit": None,
        "max_source_length": 64,
        "max_target_length": 64,
    }
    tuned = {"adapter": "tuned", "adapter_sha256": adapter.sha256, "pre_seq_len": 4}
    expected = {each.pk: each.recipe for each in (run, run.baseline)}
    EvaluationRun.objects.filter(pk=run.pk).update(recipe=flat | tuned)
    EvaluationRun.objects.filter(pk=run.baseline.pk).update(recipe=flat)

    migration = import_module("evaluation.migrations.0004_nested_recipes")
    for _ in range(2):  # done again it changes nothing
        migration.nest(apps, None)
        found = {each.pk: each.recipe for each in EvaluationRun.objects.all()}
        assert found == expected
    assert EvaluationRun.objects.get(pk=run.pk).adapter_name == "tuned"
    EvaluationRun.objects.update(scores={})
    run, base = EvaluationRun.objects.order_by("-id")
    assert compare(run, base)["rows"] == 0, "of the same rows"
