"""Rows of earlier versions."""

from importlib import import_module

import pytest
from django.apps import apps

from chat.models import Adapter
from tests.support.page_fixtures import *  # noqa: F403  a member's rows
from tests.support.page_rows import json_lines
from tuning.datasets import store

pytestmark = pytest.mark.django_db
TRICK = '", "history": [["q", "a"]], "'


def test_earlier_adapters_learn_from_their_rows_whether_they_had_history(
    member, tuning_run, adapter
):
    migration = import_module("tuning.migrations.0006_adapters_with_history")

    def learnt(rows, column=""):
        columns = {"prompt_column": "p", "response_column": "r", "history_column": column}
        found = store.ingest(json_lines(rows), name="rows", owner=member, **columns)
        tuning_run.dataset_version = found.current
        tuning_run.recipe["dataset"] = {"split": "train"}
        tuning_run.save()
        Adapter.objects.update(run=tuning_run, with_history=None)
        migration.look_into_the_rows(apps, None)
        return Adapter.objects.get().with_history

    assert learnt([{"p": TRICK, "r": TRICK}]) is False
    assert learnt([{"p": "q", "r": "a", "h": [["q", "a"]]}], "h") is True
    Adapter.objects.update(run=None, with_history=None)
    migration.look_into_the_rows(apps, None)
    assert Adapter.objects.get().with_history is None
