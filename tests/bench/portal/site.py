"""A portal with the content of a team that has used it for a while, run as people run it, with a
metronome for a model.
"""

import io
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import psutil

from tests.support.live_portal import Portal, wait_for

TEAM = 200  # members with one conversation each, for the streams
CONVERSATIONS, RUNS, DATASETS = 200, 50, 20  # of the member whose pages are measured
# questions of a conversation, logged steps of a tuning, rows of an evaluation
TURNS, STEPS, PREDICTIONS = 10, 300, 100
ANSWER = (
    "**短裤**适合夏天：\n\n- 面料透气\n- 颜色百搭\n\n```python\nprint('你好')\n```\n\n"
    + "版型宽松，线条流畅。" * 20
)


def set_up(folder: Path) -> None:
    """Django in this process, on a fresh data folder."""
    os.environ |= {"PORTAL_DATA_DIR": str(folder), "DJANGO_SETTINGS_MODULE": "portal.settings"}
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0, skip_checks=True)


def fill(folder: Path) -> dict:
    """Makes the content. Returns {"fingerprint": the checkpoint's, "pages": paths to measure,
    "reader": their reader's session, "team": [[session, conversation]]}.
    """
    from django.utils import timezone

    from chat.models import Adapter, Checkpoint, Conversation, Message
    from chat.registry import ensure_starter
    from portal.models import User

    ensure_starter()
    checkpoint = Checkpoint.default()
    team = User.objects.bulk_create([User(username=f"member{number}") for number in range(TEAM)])
    reader = User.objects.create(username="reader", is_staff=True, is_superuser=True)
    conversations = Conversation.objects.bulk_create(
        [Conversation(owner=user, checkpoint=checkpoint) for user in team]
        + [
            Conversation(owner=reader, title=f"关于短裤的第{number}次谈话")
            for number in range(CONVERSATIONS)
        ]
    )
    for number, one in enumerate(conversations[TEAM:]):
        moment = timezone.now() - timedelta(hours=3 * number)
        Conversation.objects.filter(pk=one.pk).update(updated_at=moment)
    label = {
        "checkpoint": checkpoint,
        "model_label": checkpoint.name,
        "finish_reason": "stop",
        "finished_at": timezone.now(),
    }
    Message.objects.bulk_create(
        [
            message
            for one in conversations[TEAM:]
            for _turn in range(TURNS)
            for message in (
                Message(conversation=one, role="user", content="类型#裤*版型#宽松"),
                Message(conversation=one, role="assistant", content=ANSWER, **label),
            )
        ],
        batch_size=200,
    )
    datasets = [_dataset(reader, number) for number in range(DATASETS)]
    tunings = [
        _tuning(reader, datasets[number % DATASETS], checkpoint) for number in range(RUNS // 2)
    ]
    adapters = Adapter.objects.bulk_create(
        Adapter(
            name=f"短裤{number}",
            checkpoint=checkpoint,
            owner=reader,
            run=run,
            folder=f"adapters/{number}",
            sha256=f"{number:064}",
            pre_seq_len=64,
            step=500,
        )
        for number, run in enumerate(tunings)
    )
    evaluations = [
        _evaluation(reader, datasets[0], checkpoint, adapter) for adapter in adapters[: RUNS // 4]
    ]
    pages = [
        "/",
        "/chat/",
        f"/chat/{conversations[-1].pk}/",
        "/tasks/",
        "/datasets/",
        f"/datasets/{datasets[0].pk}/",
        "/datasets/upload/",
        "/tuning/",
        "/tuning/new/",
        f"/tuning/{tunings[0].pk}/",
        "/evaluations/",
        "/evaluations/new/",
        f"/evaluations/{evaluations[0].pk}/",
        "/adapters/",
        "/account/",
        "/admin/evaluation/evaluationrun/",
        "/admin/tuning/tuningrun/",
        "/admin/tuning/dataset/",
        "/api/v1/conversations/",
        f"/api/v1/conversations/{conversations[-1].pk}/messages/",
        "/api/v1/tuning-runs/",
        "/api/v1/evaluation-runs/",
        "/api/v1/datasets/",
        "/api/v1/adapters/",
    ]
    return {
        "fingerprint": checkpoint.fingerprint,
        "pages": pages,
        "reader": _session(reader),
        "team": [[_session(user), one.pk] for user, one in zip(team, conversations, strict=False)],
    }


def _session(user) -> str:
    from django.test import Client

    client = Client()
    client.force_login(user)
    return client.cookies["sessionid"].value


def _dataset(owner, number):
    from chat.starter import sample
    from tuning.datasets.store import add_split, ingest

    rows = [
        {**row, "content": f"{row['content']}*编号#{number}"} for row in sample.load(sample.TRAIN)
    ]
    file = io.BytesIO("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    dataset = ingest(
        file, name=f"广告{number}", owner=owner, prompt_column="content", response_column="summary"
    )
    add_split(dataset, PREDICTIONS, seed=number)
    return dataset


def _ended(run) -> None:
    from portal.runs import lifecycle

    token = lifecycle.claim(run.pk)
    lifecycle.heartbeat(run.pk, token, progress=run.total)
    lifecycle.succeed(run.pk, token)


def _tuning(owner, dataset, checkpoint):
    from tuning.models import TuningMetric
    from tuning.plan import create_run

    run = create_run(owner, dataset=dataset, checkpoint=checkpoint, in_queue=False)
    metrics = [
        TuningMetric(run=run, step=step, loss=5 / step, learning_rate=0.05)
        for step in range(1, STEPS + 1)
    ]
    TuningMetric.objects.bulk_create(metrics, batch_size=200)
    _ended(run)
    return run


def _evaluation(owner, dataset, checkpoint, adapter):
    """An adapter's evaluation and its base's."""
    from evaluation.models import METRICS, EvaluationRun, Prediction
    from evaluation.plan import create_evaluation

    made, baseline = [], None
    for model in (None, adapter):
        run = create_evaluation(
            owner,
            dataset=dataset,
            checkpoint=checkpoint,
            adapter=model,
            with_baseline=False,
            in_queue=False,
        )
        scores = {metric: {"value": 30.0, "low": 28.0, "high": 32.0} for metric in METRICS}
        EvaluationRun.objects.filter(pk=run.pk).update(
            scores=scores, baseline=baseline, difference=scores if baseline else None
        )
        texts = {"prompt": "类型#裤*版型#宽松", "reference": ANSWER[-200:], "text": ANSWER[-180:]}
        rows = [
            Prediction(run=run, row=row, scores=dict.fromkeys(METRICS, row / 2), **texts)
            for row in range(PREDICTIONS)
        ]
        Prediction.objects.bulk_create(rows, batch_size=200)
        _ended(run)
        made.append(run)
        baseline = run
    return made[1]


class Site:
    """`with Site(folder, fingerprint, rate) as site:` web, queues and the metronome run; `web` and
    `worker` are psutil's.
    """

    def __init__(self, folder: Path, fingerprint: str, rate: float):
        address, token = f"unix:{folder}/worker.sock", "bench"
        self.portal = Portal(
            folder, "--no-worker", PORTAL_WORKERS=address, PORTAL_WORKER_TOKEN=token
        )
        self.metronome = [
            sys.executable,
            "-m",
            "tests.bench.metronome",
            address,
            token,
            str(rate),
            "--fingerprint",
            fingerprint,
        ]

    def __enter__(self):
        process = subprocess.Popen(self.metronome)
        self.worker = psutil.Process(process.pid)
        try:
            self.portal.__enter__()
            wait_for(self.portal.healthy, 60, "the portal")
            self.web = psutil.Process(self.portal.pid_of("portal.web_server"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        self.portal.stop()
        self.worker.terminate()
        self.worker.wait(10)
