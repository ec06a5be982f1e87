"""How long pages take over HTTP, how large they are and how many queries each costs."""

import http.client
import statistics
import time


def milliseconds(port: int, session: str, paths: list[str], rounds: int) -> dict[str, list[float]]:
    """path -> how long each of `rounds` readings took, one request at a time on one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    took: dict[str, list[float]] = {path: [] for path in paths}
    for turn in range(rounds + 1):
        for path in paths:
            begun = time.perf_counter()
            connection.request("GET", path, headers={"Cookie": f"sessionid={session}"})
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{path}: {answer.status}")
            if turn:  # the first compiles templates
                took[path].append(1000 * (time.perf_counter() - begun))
    connection.close()
    return took


def queries_and_size(session: str, path: str) -> tuple[int, int]:
    """(queries, bytes) of one reading, in this process."""
    from django.db import connection
    from django.test import Client
    from django.test.utils import CaptureQueriesContext

    client = Client(headers={"host": "localhost"})
    client.cookies["sessionid"] = session
    client.get(path)
    with CaptureQueriesContext(
        connection,
    ) as captured:
        answer = client.get(path)
    return len(captured), len(answer.content)


def table(took: dict[str, list[float]], session: str) -> None:
    print(f"{'page':44}{'median ms':>10}{'p95 ms':>9}{'queries':>9}{'KiB':>8}")
    for path, values in took.items():
        queries, size = queries_and_size(session, path)
        print(
            f"{path:44}{statistics.median(values):10.1f}{p95(values):9.1f}"
            f"{queries:9d}{size / 1024:8.0f}"
        )


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[18]
