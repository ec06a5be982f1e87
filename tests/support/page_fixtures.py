"""A member's things to look at. No worker is up here.

A module of page tests imports all of them; they stand before those of its folder's conftest.
"""

import pytest
from django.utils import timezone

from chat.conversations import live
from chat.models import Adapter, Checkpoint, Conversation, Message
from chat.worker import router
from chat.worker.router import WorkerUnavailable
from evaluation.models import METRICS
from portal.models import Run
from tests.support.page_rows import evaluation, json_lines
from tuning.datasets import store
from tuning.models import TuningMetric, TuningRun

__all__ = [
    "adapter",
    "checkpoint",
    "conversation",
    "dataset",
    "evaluated",
    "no_worker",
    "tuning_run",
]


@pytest.fixture
def no_worker(monkeypatch):
    """The worker does not answer; `generation` notes what it was asked for and finds nobody."""
    asked = []

    async def start(message):
        asked.append(message)
        error = {"message": "The inference worker is not up.", "code": "worker_unavailable"}
        await Message.objects.filter(pk=message.pk).aupdate(
            status=Message.Status.FAILED, error=error
        )
        raise WorkerUnavailable("The inference worker is not up.")

    def status_sync(*args, **options):
        raise WorkerUnavailable("nobody there")

    monkeypatch.setattr(live, "start", start)
    monkeypatch.setattr(router, "status_sync", status_sync)
    return asked


@pytest.fixture
def checkpoint(db):
    description = {
        "architecture": "Qwen2ForCausalLM",
        "context_length": 1024,
        "parameters": 2_170_000,
    }
    return Checkpoint.objects.create(
        name="base",
        path="/nowhere",
        fingerprint="f" * 64,
        description=description,
        is_default=True,
        is_starter=True,
    )


@pytest.fixture
def adapter(checkpoint, member):
    return Adapter.objects.create(
        name="tuned",
        checkpoint=checkpoint,
        owner=member,
        folder="adapters/x",
        sha256="a" * 64,
        pre_seq_len=8,
    )


@pytest.fixture
def dataset(member, data_dir):
    rows = [{"content": f"问{row}", "summary": f"答{row}"} for row in range(50)]
    return store.ingest(json_lines(rows), name="ads", owner=member)


@pytest.fixture
def tuning_run(member, dataset, checkpoint):
    run = TuningRun.objects.create(
        owner=member,
        kind=Run.Kind.TUNING,
        name="my run",
        status=Run.Status.RUNNING,
        progress=20,
        total=100,
        recipe={
            "method": "ptuning_v2",
            "max_steps": 100,
            "pre_seq_len": 8,
            "precision": "auto",
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
        },
        dataset_version=dataset.current,
        checkpoint=checkpoint,
        loss=2.5,
        started_at=timezone.now(),
        attempt=1,
    )
    points = [
        TuningMetric(run=run, step=step, loss=5 - step / 10, learning_rate=0.1)
        for step in range(1, 21)
    ]
    TuningMetric.objects.bulk_create(points)
    return run


@pytest.fixture
def evaluated(member, dataset, checkpoint, adapter):
    base = evaluation(member, dataset, checkpoint, value=10.0)
    difference = {metric: {"value": 30.0, "low": 28.0, "high": 32.0} for metric in METRICS}
    return evaluation(
        member, dataset, checkpoint, adapter, 40.0, baseline=base, difference=difference
    )


@pytest.fixture
def conversation(member, checkpoint):
    found = Conversation.objects.create(owner=member, title="mine", checkpoint=checkpoint)
    found.messages.create(role="user", content="<i>ask</i>")
    found.messages.create(
        role="assistant",
        content="**bold** <script>alert(1)</script>",
        checkpoint=checkpoint,
        model_label="base",
    )
    return found
