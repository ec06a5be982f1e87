"""Worker -> web: what a token costs on its way, and how late it is. `python -m
tests.bench.transport [--quick] [--json]`

The real server in a process of its own, with an engine that only emits (tests/bench/metronome.py),
and the real client here. CPU seconds are those of both processes, the engine's emitting included,
divided by the tokens; delays are from the engine's call of the sink to the reader's hands, on one
machine's clock. Two rhythms: `steps` as a batched engine emits (all streams at once), `even` with
every stream by itself, which is the worst case. With `cut`, the connection is aborted twice a
second. `control` is the machine itself: the same tokens in the same rhythm as bare lines over a
unix socket, without server, client or reconnection; `added_p99_ms` is ours less the control's.
"""

import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from chat.engine.request import Request
from chat.worker.router import WorkerClient
from tests.bench import report

TOKEN = "bench"
RATE = 50  # tokens a second and stream


async def measure(url: str, pid: int, streams: int, seconds: float, cut: bool) -> dict:
    client = WorkerClient(url, TOKEN)
    while True:
        try:
            if (await client.status())["state"] == "ready":
                break
        except Exception:
            await asyncio.sleep(0.1)
    tokens = int(seconds * RATE)
    question = ({"role": "user", "content": str(tokens)},)
    requests = [Request(f"{os.getpid()}-{time.monotonic()}-{i}", question) for i in range(streams)]
    delays: list[float] = []
    received = dict.fromkeys((request.id for request in requests), 0)

    async def read(id):
        async for events in client.events(id):
            now = time.monotonic()
            for event in events:
                if event.type == "delta":
                    times = event.data["text"].split()
                    received[id] += len(times)
                    delays.append(now - float(times[-1]))

    async def saw():
        while True:
            await asyncio.sleep(0.5)
            connection = client._socket._response.connection if client._socket is not None else None
            if connection is not None:
                connection.transport.abort()

    cpu, begun = _cpu(pid) + time.process_time(), time.perf_counter()
    readers = []
    for request in requests:
        await client.submit(request)
        # at once: what waits for its reader is not late
        readers.append(asyncio.create_task(read(request.id)))
    sawing = asyncio.create_task(saw()) if cut else None
    await asyncio.gather(*readers)
    if sawing:
        sawing.cancel()
    wall = time.perf_counter() - begun
    spent = _cpu(pid) + time.process_time() - cpu
    await client.close()
    return _figures(spent, delays, sum(received.values()), tokens * streams, wall)


def control_serve(path: str, streams: int, seconds: float) -> None:
    """One process that writes a line per token, all streams in one write."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(1)
        connection, _address = listening.accept()
        with connection:
            for _ in range(int(seconds * RATE)):
                due = time.perf_counter() + 1 / RATE
                lines = (
                    json.dumps([i, 1, "delta", {"text": f"{time.monotonic():.6f} "}])
                    for i in range(streams)
                )
                connection.sendall("".join(line + "\n" for line in lines).encode())
                time.sleep(max(0.0, due - time.perf_counter()))


async def control_measure(path: str, pid: int, streams: int, seconds: float) -> dict:
    while not Path(path).exists():
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.2)
    reader, writer = await asyncio.open_unix_connection(path)
    delays, begun, cpu = [], time.perf_counter(), _cpu(pid) + time.process_time()
    async for line in reader:
        delays.append(time.monotonic() - float(json.loads(line)[3]["text"]))
        if len(delays) == int(seconds * RATE) * streams:
            break
    spent, wall = _cpu(pid) + time.process_time() - cpu, time.perf_counter() - begun
    writer.close()
    return _figures(spent, delays, len(delays), len(delays), wall)


def _figures(spent: float, delays: list[float], received: int, total: int, wall: float) -> dict:
    return {
        "us_per_token": 1e6 * spent / total,
        "p50_ms": 1e3 * statistics.median(delays),
        "p99_ms": 1e3 * statistics.quantiles(delays, n=100)[98],
        "lost": total - received,
        "tokens_per_second": total / wall,
    }


def _cpu(pid: int) -> float:
    """CPU seconds of another process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(rhythm: str, streams: int, seconds: float, cut: bool = False) -> dict:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = f"{folder}/worker.sock"
        url = f"unix:{path}"
        if rhythm == "control":
            writer = multiprocessing.get_context("spawn").Process(
                target=control_serve, args=(path, streams, seconds)
            )
            writer.start()
            try:
                return asyncio.run(control_measure(path, writer.pid, streams, seconds))
            finally:
                writer.join()
        even = ["--even"] if rhythm == "even" else []
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.metronome", url, TOKEN, str(RATE), *even]
        )
        try:
            return asyncio.run(measure(url, worker.pid, streams, seconds, cut))
        finally:
            worker.terminate()
            worker.wait(10)


def main():
    arguments = report.arguments(__doc__, "one round of 5 s a case").parse_args()
    rounds, seconds = (1, 5.0) if arguments.quick else (3, 20.0)
    cases = {
        "control_100": ("control", 100),
        "steps_20": ("steps", 20),
        "steps_100": ("steps", 100),
        "steps_400": ("steps", 400),
        "even_100": ("even", 100),
        "steps_100_cut": ("steps", 100, True),
    }
    samples = defaultdict(list)
    for _ in range(rounds):
        for name, (rhythm, streams, *cut) in cases.items():
            for key, value in run(rhythm, streams, seconds, bool(cut)).items():
                samples[f"{name}_{key}"].append(value)
    results = report.medians(samples)
    results |= {key: results[f"steps_100_{key}"] for key in ("us_per_token", "p99_ms")}
    results["added_p99_ms"] = results["steps_100_p99_ms"] - results["control_100_p99_ms"]
    results["lost"] = sum(sum(values) for key, values in samples.items() if key.endswith("_lost"))
    report.tell(
        "transport",
        results,
        rounds=rounds,
        packages=("aiohttp",),
        as_json=arguments.json,
        samples=samples,
    )


if __name__ == "__main__":
    main()
