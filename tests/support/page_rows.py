"""What the page tests make and read."""

import io
import json

from evaluation.models import METRICS, EvaluationRun, Prediction
from portal.models import Run


def json_lines(rows, name="train.json"):
    file = io.BytesIO("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    file.name = name
    return file


def evaluation(owner, dataset, checkpoint, adapter=None, value=10.0, baseline=None, **more):
    scores = {metric: {"value": value, "low": value - 1, "high": value + 1} for metric in METRICS}
    run = EvaluationRun.objects.create(
        owner=owner,
        kind=Run.Kind.EVALUATION,
        name="scores",
        status=Run.Status.SUCCEEDED,
        recipe={},
        dataset_version=dataset.current,
        split="train",
        checkpoint=checkpoint,
        adapter=adapter,
        scores=scores,
        baseline=baseline,
        **{"total": 2, "progress": 2, **more},
    )
    for row, text in enumerate(["今天的裙子很好看", "<b>裤子</b>"]):
        found = dict.fromkeys(METRICS, value + row)
        Prediction.objects.create(
            run=run, row=row, prompt="p", reference="今天的裙子真好看", text=text, scores=found
        )
    return run


def text_of(response) -> str:
    """The page, its white space as a browser takes it: one blank wherever a template breaks."""
    return " ".join(response.content.decode().split())
