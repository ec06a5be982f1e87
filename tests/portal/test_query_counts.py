"""How many queries each page and list makes: query_counts.json, the same for one row as for many.

A change that is meant: QUERY_COUNTS=write pytest tests/portal/test_query_counts.py
"""

import json
import os
from datetime import timedelta
from pathlib import Path

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from chat.models import Adapter, Conversation
from portal import audit
from portal.budget import ledger
from portal.models import Run, TokenUsage
from tests.support.page_fixtures import *  # noqa: F403  this page's rows
from tests.support.page_rows import evaluation, json_lines
from tuning.datasets import store
from tuning.models import TuningRun

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_worker")]
TABLE = Path(__file__).with_name("query_counts.json")
PATHS = {
    "/": "/",
    "/chat/": "/chat/",
    "/chat/ID/": "/chat/{conversation}/",
    "/datasets/": "/datasets/",
    "/datasets/ID/": "/datasets/{dataset}/",
    "/tuning/": "/tuning/",
    "/tuning/new/": "/tuning/new/",
    "/tuning/ID/": "/tuning/{tuning_run}/",
    "/evaluations/": "/evaluations/",
    "/evaluations/new/": "/evaluations/new/",
    "/evaluations/ID/": "/evaluations/{evaluated}/",
    "/evaluations/compare/": "/evaluations/compare/?run={evaluated}",
    "/evaluations/leaderboard/": "/evaluations/leaderboard/?dataset={dataset}",
    "/tasks/": "/tasks/",
    "/devices/": "/devices/",
    "/notices/": "/notices/",
    "/account/": "/account/",
    "/usage/": "/usage/",
    "/api/v1/budget/": "/api/v1/budget/",
    "/api/v1/usage/": "/api/v1/usage/",
    "/adapters/": "/adapters/",
    "/checkpoints/": "/checkpoints/",
    "/checkpoints/new/": "/checkpoints/new/",
    "/api/v1/fetch-runs/": "/api/v1/fetch-runs/",
    "/api/v1/conversations/": "/api/v1/conversations/",
    "/api/v1/datasets/": "/api/v1/datasets/",
    "/api/v1/tuning-runs/": "/api/v1/tuning-runs/",
    "/api/v1/evaluation-runs/": "/api/v1/evaluation-runs/",
}

ADMIN = {
    "/admin/": "/admin/",
    "/admin/evaluations/": "/admin/evaluation/evaluationrun/",
    "/admin/evaluations/ID/": "/admin/evaluation/evaluationrun/{evaluated}/change/",
    "/admin/tuning/": "/admin/tuning/tuningrun/",
    "/admin/tuning/ID/": "/admin/tuning/tuningrun/{tuning_run}/change/",
    "/admin/adapters/": "/admin/chat/adapter/",
    "/admin/audit/": "/admin/admin/logentry/",
    "/admin/grants/": "/admin/budget/grant/",
    "/admin/ledger/": "/admin/budget/transaction/",
    "/admin/usage/": "/admin/portal/tokenusage/",
}


def add_more(member, checkpoint, dataset, count=4):
    """`count` more of everything that a page lists."""
    for number in range(count):
        adapter = Adapter.objects.create(
            name=f"tuned-{number}",
            checkpoint=checkpoint,
            owner=member,
            folder="adapters/x",
            sha256="a" * 64,
            pre_seq_len=8,
        )
        rows = [{"content": f"问{number}", "summary": "答"}]
        store.ingest(json_lines(rows), name=f"ads-{number}", owner=member)
        TuningRun.objects.create(
            owner=member,
            kind=Run.Kind.TUNING,
            name=f"run {number}",
            status=Run.Status.SUCCEEDED,
            recipe={"method": "ptuning_v2", "max_steps": 100},
            dataset_version=dataset.current,
            checkpoint=checkpoint,
        )
        base = evaluation(member, dataset, checkpoint)
        evaluation(member, dataset, checkpoint, adapter, 20.0, baseline=base)
        audit.note(member, base, "approved")
        use_units(member, number)
        conversation = Conversation.objects.create(owner=member, title="t", checkpoint=checkpoint)
        conversation.messages.create(role="user", content="q")


def use_units(member, number=0):
    ledger.grant(member, member, 10**6, timezone.now() + timedelta(days=1))
    ledger.charge([member], 1000)
    TokenUsage.count(member.pk, "api", f"base:{number}", 5, 5)


def count_all(client, rows, users) -> dict[str, int]:
    member, chief = users
    client.force_login(member)
    counts = _counts(client, rows, PATHS)
    client.force_login(chief)
    return counts | _counts(client, rows, ADMIN)


def _counts(client, rows, paths) -> dict[str, int]:
    counts = {}
    for name, path in paths.items():
        path = path.format(**rows)
        client.get(path)  # what is looked up once per process
        with CaptureQueriesContext(
            connection,
        ) as queries:
            assert client.get(path).status_code == 200, path
        counts[name] = len(queries)
    return counts


def test_pages_make_the_queries_of_the_table_however_many_rows_there_are(
    client, member, admin_user, checkpoint, dataset, tuning_run, evaluated, conversation, settings
):
    # nothing is collected in the tests
    plain = {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}
    settings.STORAGES = {**settings.STORAGES, "staticfiles": plain}
    users = member, admin_user
    rows = {
        "conversation": conversation.pk,
        "dataset": dataset.pk,
        "tuning_run": tuning_run.pk,
        "evaluated": evaluated.pk,
    }
    use_units(member)
    few = count_all(client, rows, users)
    if os.environ.get("QUERY_COUNTS") == "write":
        TABLE.write_text(json.dumps(few, indent=2) + "\n")
    assert few == json.loads(TABLE.read_text())
    add_more(member, checkpoint, dataset)
    many = count_all(client, rows, users)
    assert {name: many[name] for name in many if many[name] > few[name]} == {}
