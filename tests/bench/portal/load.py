"""Pages and the admin over a database that a team has filled for years.

    python -m tests.bench.portal.load [--quick] [--json]

10,000 conversations (one of 1,002 messages), 1,000 runs and 1,000,000 predictions (--quick: a
twentieth), each page asked in this process: CPU and wall time, queries, size. What lies above
100 ms of CPU is marked.
"""

import os
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from tests.bench import report
from tests.bench.portal.pages import p95
from tests.bench.portal.site import ANSWER, _dataset, _session, set_up

CONVERSATIONS, TUNINGS, EVALUATIONS, ROWS = 10_000, 500, 500, 2_000
LONG, MEMBERS, STEPS = 501, 50, 50  # turns of the long conversation; owners; logged steps
ENOUGH_MS = 100


def fill(share: int) -> tuple[str, list[str]]:
    """(the reader's session, the paths to ask). `share`: one of so many of everything."""
    from chat.models import Adapter, Checkpoint, Conversation, Message
    from chat.registry import ensure_starter
    from portal.models import User

    ensure_starter()
    checkpoint = Checkpoint.default()
    reader = User.objects.create(username="reader", is_staff=True, is_superuser=True)
    people = [reader, *User.objects.bulk_create(User(username=f"m{i}") for i in range(MEMBERS))]
    conversations = Conversation.objects.bulk_create(
        (
            Conversation(owner=reader, title=f"关于短裤的第{number}次谈话", checkpoint=checkpoint)
            for number in range(CONVERSATIONS // share)
        ),
        batch_size=500,
    )
    label = {"checkpoint": checkpoint, "model_label": checkpoint.name, "finish_reason": "stop"}
    turns = [(one, 1) for one in conversations[:-1]] + [(conversations[-1], LONG)]
    Message.objects.bulk_create(
        (
            message
            for one, count in turns
            for _turn in range(count)
            for message in (
                Message(conversation=one, role="user", content="类型#裤*版型#宽松"),
                Message(conversation=one, role="assistant", content=ANSWER, **label),
            )
        ),
        batch_size=500,
    )
    datasets = [_dataset(reader, number) for number in range(3)]
    tunings = _runs("tuning", TUNINGS // share, people, datasets, checkpoint)
    Adapter.objects.bulk_create(
        Adapter(
            name=f"短裤{number}", checkpoint=checkpoint, owner=run.owner, run=run, step=STEPS,
            folder=f"adapters/{number}", sha256=f"{number:064}", pre_seq_len=64,
        )
        for number, run in enumerate(tunings)
    )  # fmt: skip
    evaluations = _runs("evaluation", EVALUATIONS // share, people, datasets, checkpoint)
    run, tuning, dataset = evaluations[-1], tunings[-1], datasets[0]
    return _session(reader), [
        "/", "/chat/", f"/chat/{conversations[0].pk}/", f"/chat/{conversations[-1].pk}/",
        "/chat/search/?q=谈话", "/tasks/", "/tasks/?page=20", "/datasets/",
        f"/datasets/{dataset.pk}/", "/tuning/", "/tuning/new/", f"/tuning/{tuning.pk}/",
        "/evaluations/", "/evaluations/new/", f"/evaluations/{run.pk}/",
        f"/evaluations/compare/?run={run.pk}",
        f"/evaluations/leaderboard/?dataset={dataset.pk}", "/adapters/", "/checkpoints/",
        "/account/", "/admin/", "/admin/portal/user/", f"/admin/portal/user/{reader.pk}/change/",
        "/admin/chat/adapter/", "/admin/tuning/tuningrun/", "/admin/tuning/tuningrun/?q=run",
        "/admin/tuning/dataset/", "/admin/evaluation/evaluationrun/",
        "/admin/evaluation/evaluationrun/?q=run&p=2",
        f"/admin/evaluation/evaluationrun/{run.pk}/change/",
        f"/admin/tuning/tuningrun/{tuning.pk}/change/", "/admin/admin/logentry/",
        "/api/v1/conversations/", f"/api/v1/conversations/{conversations[-1].pk}/messages/",
        "/api/v1/tuning-runs/", "/api/v1/evaluation-runs/", "/api/v1/adapters/",
        f"/api/v1/evaluation-runs/{run.pk}/predictions/?page_size=500", "/api/v1/queue/",
        "/healthz", "/metrics",
    ]  # fmt: skip


def _runs(kind: str, count: int, people, datasets, checkpoint) -> list:
    """Ended runs of everybody, the first as the portal makes them and the rest its copies."""
    from django.db import connection
    from django.utils import timezone

    from evaluation.metrics import METRICS
    from evaluation.models import EvaluationRun, Prediction
    from evaluation.plan import create_evaluation
    from portal.models import Run
    from tuning.models import TuningMetric, TuningRun
    from tuning.plan import create_run

    made = []
    scores = {metric: {"value": 30.0, "low": 28.0, "high": 32.0} for metric in METRICS}
    for number in range(count):
        owner, dataset = people[number % len(people)], datasets[number % len(datasets)]
        if kind == "tuning":
            run = create_run(owner, dataset=dataset, checkpoint=checkpoint, in_queue=False)
        else:
            run = create_evaluation(
                owner, dataset=dataset, checkpoint=checkpoint, adapter=None, with_baseline=False,
                in_queue=False,
            )  # fmt: skip
        ended = timezone.now() - timedelta(hours=count - number)
        Run.objects.filter(pk=run.pk).update(
            status="succeeded", name=f"run {number}", started_at=ended, finished_at=ended
        )
        made.append(run)
    if kind == "tuning":
        TuningMetric.objects.bulk_create(
            (
                TuningMetric(run=run, step=step, loss=5 / step, learning_rate=0.05)
                for run in made
                for step in range(1, STEPS + 1)
            ),
            batch_size=900,
        )
        return list(TuningRun.objects.order_by("pk"))
    EvaluationRun.objects.update(scores=scores)
    first = made[0]
    texts = {"prompt": "类型#裤*版型#宽松", "reference": "透气百搭", "text": "宽松透气"}
    Prediction.objects.bulk_create(
        (
            Prediction(run=first, row=row, scores=dict.fromkeys(METRICS, row % 100), **texts)
            for row in range(ROWS)
        ),
        batch_size=900,
    )
    columns = [
        field.column
        for field in Prediction._meta.concrete_fields
        if field.column not in ("id", "run_id")
    ]
    names, table = ", ".join(f'"{each}"' for each in columns), Prediction._meta.db_table
    with connection.cursor() as cursor:  # a million rows in seconds
        for run in made[1:]:
            cursor.execute(
                f'INSERT INTO "{table}" (run_id, {names}) '
                f'SELECT %s, {names} FROM "{table}" WHERE run_id = %s',
                [run.pk, first.pk],
            )
    return list(EvaluationRun.objects.order_by("pk"))


def ask(session: str, paths: list[str], rounds: int) -> dict[str, dict]:
    """path -> {"cpu": [ms], "wall": [ms], "queries", "kib"}."""
    from django.db import connection
    from django.test import Client
    from django.test.utils import CaptureQueriesContext

    client = Client(headers={"host": "localhost"})
    client.cookies["sessionid"] = session
    found: dict[str, dict] = {}
    for path in paths:
        with CaptureQueriesContext(connection) as captured:
            answer = client.get(path)
        if answer.status_code != 200:
            raise RuntimeError(f"{path}: {answer.status_code}")
        body = b"".join(answer.streaming_content) if answer.streaming else answer.content
        found[path] = {
            "cpu": [], "wall": [], "queries": len(captured), "kib": len(body) / 1024,
            "slowest": max(captured, key=lambda each: float(each["time"]), default=None),
        }  # fmt: skip
        for _round in range(rounds):
            cpu, wall = time.process_time(), time.perf_counter()
            client.get(path)
            found[path]["wall"].append(1000 * (time.perf_counter() - wall))
            found[path]["cpu"].append(1000 * (time.process_time() - cpu))
    return found


def table(found: dict[str, dict]) -> None:
    head = "".join(f"{name:>9}" for name in ("cpu med", "cpu p95", "wall p95", "queries", "KiB"))
    print(f"{'page':52}{head}")
    for path, told in sorted(found.items(), key=lambda each: -statistics.median(each[1]["cpu"])):
        cpu = statistics.median(told["cpu"])
        print(
            f"{path:52}{cpu:9.1f}{p95(told['cpu']):9.1f}{p95(told['wall']):9.1f}"
            f"{told['queries']:9d}{told['kib']:9.0f}{'  slow' if cpu > ENOUGH_MS else ''}"
        )
        if cpu > ENOUGH_MS and told["slowest"]:
            print(f"    {told['slowest']['time']} s: {told['slowest']['sql'][:300]}")


def main() -> None:
    arguments = report.arguments(__doc__, "a twentieth of everything").parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        os.environ["PORTAL_DEBUG"] = "1"  # the pages need no collected files then
        set_up(Path(folder))
        begun = time.perf_counter()
        session, paths = fill(20 if arguments.quick else 1)
        print(f"filled in {time.perf_counter() - begun:.0f} s")
        found = ask(session, paths, 5 if arguments.quick else 10)
    table(found)
    cpu = [value for told in found.values() for value in told["cpu"]]
    wall = [value for told in found.values() for value in told["wall"]]
    report.tell(
        "portal_load",
        {
            "page_cpu_p95_ms": p95(cpu),
            "page_p95_ms": p95(wall),
            "slowest_page_cpu_ms": max(statistics.median(told["cpu"]) for told in found.values()),
            "pages_above_100_cpu_ms": sum(
                statistics.median(told["cpu"]) > ENOUGH_MS for told in found.values()
            ),
        },
        rounds=1,
        packages=("django",),
        as_json=arguments.json,
    )


if __name__ == "__main__":
    main()
