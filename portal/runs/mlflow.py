"""A run's figures sent to an MLflow server, over its REST API (mlflow.org, "REST API", 2.0): five
calls do not pay for a client of thirty packages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
from django.conf import settings

from portal.models import Run
from portal.runs.figures import Figure

TIMEOUT = 10.0  # seconds for one call
METRICS_AT_ONCE, PARAMS_AT_ONCE, LONGEST_VALUE = 1000, 100, 500  # what the server takes


def send(run: Run, figures: Sequence[Figure]) -> dict[str, str]:
    """What `Run.tracking` keeps: {"url"} of the run there, or {"error"}. Never raises: a tracking
    server that is away is no reason to lose a run.
    """
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # the run's log is for people
    base = settings.MLFLOW_URL.rstrip("/")
    key = settings.MLFLOW_TOKEN
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx2.Client(base_url=base, headers=headers, timeout=TIMEOUT) as client:
            experiment = _experiment(client)
            there = _started(client, experiment, run)
            _log(client, there, run, figures)
            ended = run.finished_at.timestamp() if run.finished_at else time.time()
            body = {"run_id": there, "status": "FINISHED", "end_time": int(ended * 1000)}
            _call(client, "POST", "runs/update", body)
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError) as fault:
        return {"error": f"{type(fault).__name__}: {fault}"[:300]}
    shown = httpx2.URL(base).copy_with(username=None, password=None)
    return {"url": f"{str(shown).rstrip('/')}/#/experiments/{experiment}/runs/{there}"}


def _call(client: httpx2.Client, method: str, path: str, fields: dict[str, Any]) -> Any:
    """The answer's object. httpx2.HTTPError, ValueError."""
    given = {"params": fields} if method == "GET" else {"json": fields}
    answer = client.request(method, f"/api/2.0/mlflow/{path}", **given)
    if answer.status_code >= 400:
        raise ValueError(f"{path}: {answer.status_code} {answer.text[:200]}")
    return answer.json()


def _experiment(client: httpx2.Client) -> str:
    """The number of the configured experiment, which is made where there is none."""
    name = settings.MLFLOW_EXPERIMENT
    path = "/api/2.0/mlflow/experiments/get-by-name"
    answer = client.get(path, params={"experiment_name": name})
    if answer.status_code == 404:
        return str(_call(client, "POST", "experiments/create", {"name": name})["experiment_id"])
    if answer.status_code >= 400:
        raise ValueError(f"experiments/get-by-name: {answer.status_code} {answer.text[:200]}")
    return str(answer.json()["experiment"]["experiment_id"])


def _started(client: httpx2.Client, experiment: str, run: Run) -> str:
    begun = run.started_at or run.created_at
    tags = {"portal.run": str(run.pk), "portal.kind": run.kind, "mlflow.user": str(run.owner)}
    body = {
        "experiment_id": experiment,
        "run_name": run.name,
        "start_time": int(begun.timestamp() * 1000),
        "tags": [{"key": key, "value": value} for key, value in tags.items()],
    }
    return str(_call(client, "POST", "runs/create", body)["run"]["info"]["run_id"])


def _log(client: httpx2.Client, there: str, run: Run, figures: Sequence[Figure]) -> None:
    params = [{"key": key, "value": str(value)[:LONGEST_VALUE]} for key, value in flat(run.recipe)]
    for start in range(0, len(params), PARAMS_AT_ONCE):
        some = params[start : start + PARAMS_AT_ONCE]
        _call(client, "POST", "runs/log-batch", {"run_id": there, "params": some})
    for start in range(0, len(figures), METRICS_AT_ONCE):
        metrics = [
            {
                "key": figure.tag,
                "value": figure.value,
                "step": figure.step,
                "timestamp": int(figure.at * 1000),
            }
            for figure in figures[start : start + METRICS_AT_ONCE]
        ]
        _call(client, "POST", "runs/log-batch", {"run_id": there, "metrics": metrics})


def flat(recipe: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of a recipe; what lies inside an object is named "object.name"."""
    for name, value in recipe.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
