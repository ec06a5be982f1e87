"""Worker -> web: what a token costs on its way, and how late it is. `python -m tests.bench.transport [--quick] [--json]`

The real server in a process of its own, with an engine that only emits (tests/chat/worker/pretend.py has none of this speed), and
the real client here. CPU seconds are those of both processes, the engine's emitting included, divided by the tokens; delays are
from the engine's call of the sink to the reader's hands, on one machine's clock. Two rhythms: `steps` as a batched engine emits
(all streams at once), `even` with every stream by itself, which is the worst case. With `cut`, the connection is aborted twice a
second. `control` is the machine itself: the same tokens in the same rhythm as bare lines over a unix socket, without server, client
or reconnection; `added_p99_ms` is ours less the control's.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

from chat.engine.request import Event, Request
from chat.worker_client import WorkerClient

TOKEN = "bench"
RATE = 50  # tokens a second and stream


class Metronome:
    """An engine whose sequences emit RATE tokens a second; each token's text is the time of its emission."""

    def __init__(self, rhythm: str):
        self.rhythm = rhythm
        self.new: deque = deque()

    def submit(self, request, sink):
        self.new.append([request.id, sink, 0, int(request.messages[0]["content"])])

    def abort(self, request_id):
        pass

    def status(self):
        return {}

    def close(self):
        pass

    def run_forever(self, stop: threading.Event):
        rows: deque = deque()
        while not stop.is_set():
            while self.new:
                rows.append(self.new.popleft())
            if not rows:
                time.sleep(0.002)
                continue
            batch = len(rows) if self.rhythm == "steps" else 1
            due = time.perf_counter() + batch / len(rows) / RATE
            for _ in range(batch):
                row = rows.popleft()
                if self._emit(row):
                    rows.append(row)
            time.sleep(max(0.0, due - time.perf_counter()))

    def _emit(self, row) -> bool:
        id, sink, done, total = row
        row[2] = done + 1
        if done == total:
            sink(Event(id, done + 1, "finished", {"finish_reason": "stop", "usage": {}, "timings": {}}))
            return False
        sink(Event(id, done + 1, "delta", {"text": f"{time.monotonic():.6f} ", "tokens": 1}))
        return True


async def measure(url: str, pid: int, streams: int, seconds: float, cut: bool) -> dict:
    client = WorkerClient(url, TOKEN)
    while True:
        try:
            if (await client.status())["state"] == "ready":
                break
        except Exception:
            await asyncio.sleep(0.1)
    tokens = int(seconds * RATE)
    requests = [Request(f"{os.getpid()}-{time.monotonic()}-{i}", ({"content": str(tokens)},)) for i in range(streams)]
    for request in requests:
        request.messages[0]["role"] = "user"
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
        readers.append(asyncio.create_task(read(request.id)))  # at once: what waits for its reader is not late
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
                lines = (json.dumps([i, 1, "delta", {"text": f"{time.monotonic():.6f} "}]) for i in range(streams))
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


def serve(url: str, rhythm: str) -> int:
    from chat.engine import worker
    from chat.engine.wire import Address

    return asyncio.run(
        worker.serve(worker.bind(Address.parse(url)), TOKEN, lambda: (Metronome(rhythm), "f"), name="bench")
    )


def run(rhythm: str, streams: int, seconds: float, cut: bool = False) -> dict:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = f"{folder}/worker.sock"
        url = f"unix:{path}"
        if rhythm == "control":
            writer = multiprocessing.get_context("spawn").Process(target=control_serve, args=(path, streams, seconds))
            writer.start()
            try:
                return asyncio.run(control_measure(path, writer.pid, streams, seconds))
            finally:
                writer.join()
        worker = subprocess.Popen([sys.executable, "-m", "tests.bench.transport", "--serve", url, rhythm])
        try:
            return asyncio.run(measure(url, worker.pid, streams, seconds, cut))
        finally:
            worker.terminate()
            worker.wait(10)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", nargs=2, metavar=("URL", "RHYTHM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        sys.exit(serve(*arguments.serve))
    rounds, seconds = (1, 5.0) if arguments.quick else (3, 20.0)
    cases = {
        "control_100": ("control", 100), "steps_20": ("steps", 20), "steps_100": ("steps", 100), "steps_400": ("steps", 400),
        "even_100": ("even", 100), "steps_100_cut": ("steps", 100, True),
    }  # fmt: skip
    found: dict[str, list[dict]] = {name: [] for name in cases}
    print(f"{'case':16}{'us/token':>10}{'p50 ms':>9}{'p99 ms':>9}{'lost':>6}{'tokens/s':>10}")
    for _ in range(rounds):
        for name, (rhythm, streams, *cut) in cases.items():
            figures = run(rhythm, streams, seconds, bool(cut))
            found[name].append(figures)
            values = (figures[key] for key in ("us_per_token", "p50_ms", "p99_ms", "lost", "tokens_per_second"))
            print(
                f"{name:16}{next(values):10.1f}{next(values):9.2f}{next(values):9.2f}{next(values):6d}{next(values):10.0f}",
                flush=True,
            )
    results = {
        f"{name}_{key}": round(statistics.median(figures[key] for figures in rows), 2)
        for name, rows in found.items()
        for key in rows[0]
    }
    results |= {key: results[f"steps_100_{key}"] for key in ("us_per_token", "p99_ms")}
    results["added_p99_ms"] = round(results["steps_100_p99_ms"] - results["control_100_p99_ms"], 2)
    results["lost"] = sum(figures["lost"] for rows in found.values() for figures in rows)
    if arguments.json:
        import aiohttp

        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()[0]}
        versions = {"python": platform.python_version(), "aiohttp": aiohttp.__version__}
        print(
            json.dumps(
                {"bench": "transport", "machine": machine, "versions": versions, "rounds": rounds, "results": results}
            )
        )


if __name__ == "__main__":
    main()
