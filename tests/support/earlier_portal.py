"""A database as the first version left it, and a look at it after an update.
`python -m tests.support.earlier_portal fill|look`.

`fill` makes the tables of each app's first migration and one row of every kind in them, by the
models as they were then; `look` asks for every page with the models of today.
"""

import json
import os
import sys

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")

import django

django.setup()

from django.conf import settings
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.test import Client

FIRST = {"portal": "0001_", "chat": "0002_", "tuning": "0001_", "evaluation": "0001_"}
ANSWER = "**answer** of an earlier version"


def fill() -> None:
    executor = MigrationExecutor(connection)
    nodes = executor.loader.graph.nodes
    first = [node for node in nodes if node[1].startswith(FIRST.get(node[0], "0"))]
    first = [node for node in first if node[0] in FIRST]
    # the first version had no budget, whose tables stand on later ones
    later = {*FIRST, "budget"}
    others = [node for node in executor.loader.graph.leaf_nodes() if node[0] not in later]
    old = executor.migrate([*first, *others]).apps

    def make(model: str, **fields):
        return old.get_model(model).objects.create(**fields)

    owner = make("portal.User", username="member", password="!")
    make("portal.ApiKey", owner=owner, name="k", prefix="sk-abc", digest="d" * 64)
    base = make("chat.Checkpoint", name="base", path="/nowhere", fingerprint="f" * 64,
                description={"architecture": "Qwen2ForCausalLM"}, is_default=True)  # fmt: skip
    dataset = make("tuning.Dataset", name="rows", owner=owner, status="ready",
                   prompt_column="content", response_column="summary",
                   problems=[{"line": 3, "message": "empty", "code": "blank"}])  # fmt: skip
    version = make("tuning.DatasetVersion", dataset=dataset, number=1, sha256="a" * 64,
                   splits={"train": {"rows": 2, "sha256": "a" * 64}})  # fmt: skip
    flat = {"dataset": "rows", "dataset_version": 1, "dataset_sha256": "a" * 64, "rows": 2,
            "split": "train", "checkpoint": "base", "checkpoint_fingerprint": "f" * 64,
            "adapter": "tuned", "adapter_sha256": "c" * 64, "pre_seq_len": 4}  # fmt: skip
    nested = {"dataset": {"id": dataset.pk, "name": "rows", "version": 1, "split": "train",
                          "sha256": "a" * 64, "rows": 2},
              "checkpoint": {"id": base.pk, "name": "base", "fingerprint": "f" * 64},
              "method": "ptuning_v2", "max_steps": 2, "pre_seq_len": 4}  # fmt: skip
    work = {"owner": owner, "name": "old", "status": "succeeded", "task": "t",
            "dataset_version": version, "checkpoint": base}  # fmt: skip
    run = make("tuning.TuningRun", kind="tuning", loss=1.5, recipe=nested, **work)
    make("tuning.TuningMetric", run=run, step=1, loss=2.0, learning_rate=0.1)
    adapter = make("chat.Adapter", name="tuned", checkpoint=base, owner=owner, run_id=run.pk,
                   folder="adapters/x", sha256="c" * 64, pre_seq_len=4)  # fmt: skip
    interval = {"value": 10.0, "low": 9.0, "high": 11.0}
    metrics = ["rouge-1", "rouge-2", "rouge-l", "bleu-4"]
    scores = dict.fromkeys(metrics, interval)
    judged = make("evaluation.EvaluationRun", kind="evaluation", split="train", scores=scores,
                  adapter=adapter, recipe=flat, **work)  # fmt: skip
    make("evaluation.Prediction", run=judged, row=0, prompt="p", reference="r", text="t",
         scores=dict.fromkeys(metrics, 10.0))  # fmt: skip
    make("portal.Run", owner=owner, kind="tuning", name="waiting", status="queued", task="t")
    talk = make("chat.Conversation", owner=owner, title="old talk", checkpoint=base)
    make("chat.Message", conversation=talk, role="user", content="question")
    make("chat.Message", conversation=talk, role="assistant", content=ANSWER, adapter=adapter)


def look() -> None:
    """{path: [status, text]} of the pages and lists that show those rows."""
    from chat.models import Conversation
    from evaluation.models import EvaluationRun
    from portal.models import User
    from tuning.models import Dataset, TuningRun

    settings.ALLOWED_HOSTS = ["*"]
    plain = "django.contrib.staticfiles.storage.StaticFilesStorage"
    settings.STORAGES = {**settings.STORAGES, "staticfiles": {"BACKEND": plain}}
    browser = Client(raise_request_exception=False)
    browser.force_login(User.objects.get())
    rows = {
        "chat": Conversation, "datasets": Dataset, "tuning": TuningRun,
        "evaluations": EvaluationRun,
    }  # fmt: skip
    paths = [f"/{name}/{model.objects.get().pk}/" for name, model in rows.items()]
    lists = ["datasets", "tuning-runs", "evaluation-runs", "adapters", "conversations"]
    paths += ["/", "/tasks/", "/adapters/", "/account/", *(f"/api/v1/{name}/" for name in lists)]
    told = {}
    for path in paths:
        answer = browser.get(path)
        told[path] = [answer.status_code, answer.content.decode()]
    print(json.dumps(told))


if __name__ == "__main__":
    {"fill": fill, "look": look}[sys.argv[1]]()
