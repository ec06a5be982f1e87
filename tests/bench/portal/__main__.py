"""The portal around the model: streams, idle and stalled sockets, the database, pages.

    python -m tests.bench.portal [--quick] [--json]

`python -m tests.bench.portal.load` asks the pages of a database filled for years.

The real web process (daphne, SQLite, the queues beside it) and the real worker's server in a
process of its own, with an engine that only emits (tests/bench/metronome.py): 30 tokens a second
and stream. The clients are a third process, whose CPU competes for the same cores:
`client_cpu_share` says with how much.

How late a token is, is the time from the engine's call of its sink to the moment when the client
has parsed the frame: the worker's socket, the web process with its 50 ms between two frames of an
answer (not subtracted), the websocket, the client's own queue.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

from tests.bench import report
from tests.bench.portal import database, pages, rendering
from tests.bench.portal.site import Site, fill, set_up

RATE = 30  # tokens a second and stream
STREAMS, BESIDE_STALLED, IDLE = 200, 50, 1000
LONG_CHARACTERS = 8192  # of each token of the answer that one reader does not read: 240 KB/s


class Load:
    """One load process; meanwhile the web process's memory is watched."""

    def __init__(self, site: Site, plan: dict):
        self.site, self.plan = site, {"port": site.portal.port, **plan}

    def run(self) -> dict:
        """The load's outcome with web_cpu_s, worker_cpu_s, cpu_seconds (its own), wall_s and
        grown_mib.
        """
        web, worker = self.site.web, self.site.worker
        before, self.highest = web.memory_info().rss, 0
        spent, begun = (_cpu(web), _cpu(worker)), time.perf_counter()
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(ended,))
        watch.start()
        argv = [sys.executable, "-m", "tests.bench.portal.sockets"]
        try:
            done = subprocess.run(
                argv, input=json.dumps(self.plan), check=True, stdout=subprocess.PIPE, text=True
            )
        finally:
            ended.set()
            watch.join()
        return json.loads(done.stdout) | {
            "wall_s": time.perf_counter() - begun,
            "web_cpu_s": _cpu(web) - spent[0],
            "worker_cpu_s": _cpu(worker) - spent[1],
            "grown_mib": (self.highest - before) / 2**20,
        }

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(0.2):
            self.highest = max(self.highest, self.site.web.memory_info().rss)


def _cpu(process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def one_round(site: Site, made: dict, seconds: float) -> dict[str, float]:
    team, tokens = made["team"], int(seconds * RATE)
    plan = {"kind": "streams", "team": team, "tokens": tokens, "count": STREAMS, "pause": 0.025}
    full = Load(site, plan).run()
    burst = Load(site, plan | {"tokens": RATE, "pause": 0}).run()
    plan |= {"count": BESIDE_STALLED, "long": f"{tokens} {LONG_CHARACTERS}"}
    read = Load(site, plan | {"deaf": False}).run()
    stalled = Load(site, plan | {"deaf": True}).run()
    idle = Load(
        site, {"kind": "idle", "team": team, "count": IDLE, "seconds": min(seconds, 5.0)}
    ).run()
    return {
        "delivered_fraction_200": full["delivered"],
        "added_p50_ms_200": full["p50_ms"],
        "added_p99_ms_200": full["p99_ms"],
        "web_us_per_token_200": 1e6 * full["web_cpu_s"] / full["tokens"],
        "web_us_per_frame_200": 1e6 * full["web_cpu_s"] / full["frames"],
        "worker_us_per_token_200": 1e6 * full["worker_cpu_s"] / full["tokens"],
        "web_cpu_share": full["web_cpu_s"] / full["wall_s"],
        "client_cpu_share": full["cpu_seconds"] / full["wall_s"],
        "first_token_p50_ms": full["first_token_p50_ms"],
        "burst_200_first_token_p50_ms": burst["first_token_p50_ms"],
        "streams_200_mib": full["grown_mib"],
        "idle_1000_failed": idle["failed"],
        "idle_1000_mib": idle["grown_mib"],
        "idle_1000_open_seconds": idle["open_seconds"],
        "stalled_client_mib": stalled["grown_mib"],
        "reading_client_mib": read["grown_mib"],
        "beside_stalled_p99_ms": stalled["p99_ms"],
        "beside_reading_p99_ms": read["p99_ms"],
    }


def measure(
    folder: Path, quick: bool, rounds: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(results, their samples by round)."""
    set_up(folder)
    made = fill(folder)
    samples = defaultdict(list)
    with Site(folder, made["fingerprint"], RATE) as site:
        took = pages.milliseconds(
            site.portal.port, made["reader"], made["pages"], 10 if quick else 40
        )
        for _ in range(rounds):
            for key, value in one_round(site, made, 8.0 if quick else 20.0).items():
                samples[key].append(value)
    pages.table(took, made["reader"])
    written = database.measure(5.0 if quick else 20.0)
    short = [value for role in ("web", "heartbeat") for value in written[role]["took"]]
    results = report.medians(samples) | {
        "sqlite_lock_errors": sum(role["errors"] for role in written.values()),
        "sqlite_p99_ms": sorted(short)[int(0.99 * len(short))],
        "sqlite_writes_per_s": len(short) / (5.0 if quick else 20.0),
        "page_p95_ms": pages.p95([value for values in took.values() for value in values]),
    }
    results |= rendering.measure(5 if quick else 20)
    return results, samples


def main() -> None:
    arguments = report.arguments(__doc__, "one round of shorter loads: about a minute").parse_args()
    rounds = 1 if arguments.quick else 3
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        results, samples = measure(Path(folder), arguments.quick, rounds)
    report.tell(
        "portal",
        results,
        rounds=rounds,
        packages=("django", "channels", "daphne", "aiohttp"),
        as_json=arguments.json,
        samples=samples,
    )


if __name__ == "__main__":
    main()
