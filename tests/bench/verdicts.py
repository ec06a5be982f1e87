"""Evaluation's pages over many runs and predictions: CPU-seconds of a request, the second of two,
and its queries.

    python -m tests.bench.verdicts [--quick] [--json]

1,000 evaluations of 1,000 rows each, 500 of them of a tuned model beside its base, on the portal's
own SQLite; pages and REST as an administrator who sees everything.
"""

import random
import tempfile
import time
from pathlib import Path

from tests.bench import report
from tests.bench.datasets import set_up, take_in, write_rows


def fill(runs: int, rows: int) -> None:
    """Half of them the bare checkpoint, each second one a tuned model beside the one before."""
    from chat.models import Adapter, Checkpoint
    from evaluation.intervals import average
    from evaluation.metrics import METRICS
    from evaluation.models import EvaluationRun, Prediction
    from portal.models import Run, User
    from tuning.models import DatasetVersion

    chance = random.Random(1)
    owner = User.objects.create_superuser("chief")
    version, previous = DatasetVersion.objects.get(), None
    base = Checkpoint.objects.create(name="base", path="/nowhere", fingerprint="f" * 64)
    for number in range(runs):
        tuned = number % 2
        adapter = tuned and Adapter.objects.create(
            name=f"tuned {number}",
            checkpoint=base,
            owner=owner,
            folder="x",
            sha256=f"{number:064}",
            pre_seq_len=8,
        )
        recipe = {"dataset": {"sha256": "d" * 64, "split": "train"}, "rows": rows}
        if tuned:
            recipe["adapter"] = {"name": adapter.name}
        values = [
            {metric: chance.uniform(0, 60) + 10 * tuned for metric in METRICS} for _ in range(rows)
        ]
        run = EvaluationRun.objects.create(
            owner=owner,
            kind=Run.Kind.EVALUATION,
            status=Run.Status.SUCCEEDED,
            name=f"run {number}",
            recipe=recipe,
            dataset_version=version,
            split="train",
            checkpoint=base,
            adapter=adapter or None,
            baseline=previous if tuned else None,
            total=rows,
            progress=rows,
            scores=average(values[:50]),
            general={},
        )
        previous = run
        Prediction.objects.bulk_create(
            Prediction(
                run=run,
                row=row,
                prompt="类型#裙*版型#显瘦*风格#文艺",
                reference="这条裙子版型显瘦，很文艺。" * 4,
                text=f"裙子{row}很好看，显瘦文艺。" * 4,
                scores=values[row],
            )
            for row in range(rows)
        )


def main() -> None:
    options = report.arguments(__doc__, "50 runs of 200 rows").parse_args()
    runs, rows = (50, 200) if options.quick else (1000, 1000)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        set_up(folder / "data")
        path = folder / "rows.json"
        write_rows(path, count=rows)
        take_in(path)

        from django.conf import settings
        from django.core.management import call_command
        from django.db import connection, transaction
        from django.test import Client
        from django.test.utils import CaptureQueriesContext

        from evaluation.models import EvaluationRun
        from portal.models import User

        settings.ALLOWED_HOSTS = ["*"]
        call_command("collectstatic", verbosity=0, interactive=False)
        with transaction.atomic():
            fill(runs, rows)
        numbers = sorted(EvaluationRun.objects.values_list("pk", flat=True))
        base, tuned = numbers[-2:]
        pages = {
            "list": "/evaluations/",
            "evaluation": f"/evaluations/{tuned}/",
            "regressions": f"/evaluations/{tuned}/?show=regressions",
            "comparison_of_2": f"/evaluations/compare/?baseline={base}&run={tuned}",
            "choice_of_comparison": f"/evaluations/compare/?run={tuned}",
            "leaderboard": "/evaluations/leaderboard/",
            "home": "/",
            "admin_list": "/admin/evaluation/evaluationrun/",
            "admin_search": "/admin/evaluation/evaluationrun/?q=run+77",
            "admin_evaluation": f"/admin/evaluation/evaluationrun/{tuned}/change/",
            "admin_predictions": f"/admin/evaluation/evaluationrun/{tuned}/change/?page=2",
            "rest_list": "/api/v1/evaluation-runs/",
            "rest_predictions": f"/api/v1/evaluation-runs/{tuned}/predictions/",
        }
        client = Client()
        user = User.objects.get(username="chief")
        client.force_login(user)
        results: dict[str, float] = {"predictions": runs * rows}
        for name, url in pages.items():
            client.get(url)
            began = time.process_time()
            with CaptureQueriesContext(connection) as queries:
                answer = client.get(url)
            results[f"{name}_cpu_seconds"] = time.process_time() - began
            results[f"{name}_queries"] = len(queries)
            if answer.status_code != 200:
                raise SystemExit(f"{url} answered {answer.status_code}")
    report.tell("verdicts", results, rounds=1, packages=("Django",), as_json=options.json)


if __name__ == "__main__":
    main()
