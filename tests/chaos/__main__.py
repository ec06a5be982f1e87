"""`python -m tests.chaos --seed 1 --faults 50`: a portal at work, and faults in random order.

While tuning runs, evaluations and chat go on, one process after another is killed (kill -9) or
stopped (SIGSTOP) and the database is locked. At the end every run must have succeeded, the adapters
must be those of an undisturbed run bit for bit, no row may be done twice, no message be left
half-way, and no process be left. The last line is a JSON object of figures; exit code 1 when one of
them is wrong. PORTAL_DATABASE_URL and PORTAL_REDIS_URL choose another database and broker.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from tests.support import tiny_training as tiny
from tests.support.live_portal import Portal, wait_for

SAVE_STEPS = 20
# name -> (words of its command line, every one of them a victim of its own)
VICTIMS = {
    "run's process": "portal.runs.process",
    "queue process": "qcluster",  # worker, sentinel, main process: whichever
    "web": "portal.web_server",
    "inference worker": "inference_worker",
    "supervisor": "manage.py up",
}


@dataclass
class Figures:
    seed: int
    faults: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    succeeded: int = 0
    resumed_by_hand: int = 0  # after three lost processes, as a member would
    done_twice: int = 0
    adapters_that_differ: int = 0
    most_steps_repeated: int = 0
    messages: int = 0
    interrupted: int = 0
    stuck: int = 0
    processes_left: int = 0
    seconds: float = 0.0

    def faultless(self) -> bool:
        return (
            self.succeeded == self.runs
            and self.most_steps_repeated <= SAVE_STEPS
            and not self.done_twice + self.adapters_that_differ + self.stuck + self.processes_left
        )


class Chaos:
    def __init__(self, portal: Portal, folder: Path, options: argparse.Namespace):
        self.portal, self.chance = portal, random.Random(options.seed)
        self.steps, self.chat, self.kills = options.steps, not options.no_chat, options.kills
        self.victim = options.victim
        self.figures = Figures(options.seed)
        self.key = portal.manage("create_api_key", "admin").strip()
        portal.manage("add_checkpoint", str(tiny.write(folder / "tiny")), "--name", "tiny")
        rows = folder / "rows.json"
        rows.write_text("\n".join(json.dumps(row) for row in tiny.examples(40)), encoding="utf-8")
        portal.manage(
            "shell", "-v", "0", "-c",
            "from tuning.datasets.store import ingest; from portal.models import User;"
            f"ingest(open({str(rows)!r}, 'rb'), name='rows', owner=User.objects.get())",
        )  # fmt: skip
        self.dataset = next(row["id"] for row in self.all("datasets") if row["name"] == "rows")
        self.base = next(row["id"] for row in self.all("checkpoints") if row["name"] == "tiny")

    # ---- what members do

    def call(self, method: str, path: str, body=None):
        """(status, answer), asked again while the web is away or away from its database."""

        refusals: list = []

        def answered():
            try:
                told = self.portal.call(method, f"/api/v1/{path}", body, key=self.key)
            except (URLError, OSError, ValueError) as away:
                refusals.append(away)
                return None
            if told[0] in (500, 503, 507):
                refusals.append(told)
                return None
            return told

        try:
            return wait_for(answered, 240, path)
        except AssertionError:
            output = self.portal.output()[-2000:]
            raise AssertionError(f"{path}: {refusals[-1]}\n{output}") from None

    def all(self, kind: str) -> list[dict]:
        return self.call("GET", f"{kind}/?page_size=500")[1]["results"]

    def tune(self) -> int:
        body = {
            "dataset": self.dataset, "checkpoint": self.base, "name": "chaos",
            "pre_seq_len": 4, "max_steps": self.steps, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1, "max_source_length": 40, "max_target_length": 24,
            "logging_steps": 5, "save_steps": SAVE_STEPS, "learning_rate": 0.05,
        }  # fmt: skip
        return self.call("POST", "tuning-runs/", body)[1]["id"]

    def evaluate(self, adapter: int | None = None) -> int:
        body = {
            "dataset": self.dataset, "checkpoint": self.base, "adapter": adapter,
            "max_target_length": 24, "max_source_length": 40, "with_baseline": False,
        }  # fmt: skip
        return self.call("POST", "evaluation-runs/", body)[1]["id"]

    def ended(self, kind: str, run: int, seconds: float) -> dict:
        def state():
            told = self.call("GET", f"{kind}/{run}/")[1]
            if told["status"] == "failed" and told["error"]["code"] == "process_lost":
                self.figures.resumed_by_hand += 1
                self.call("POST", f"{kind}/{run}/resume/")
                return None
            return told if told["status"] not in ("queued", "running") else None

        return wait_for(state, seconds, f"{kind} {run}")

    def talk(self, over: threading.Event) -> None:
        while not over.is_set():
            conversation = self.call("POST", "conversations/", {"title": "chaos"})[1]["id"]
            self.call("POST", f"conversations/{conversation}/messages/", {"content": "你好"})
            over.wait(0.5)

    # ---- what goes wrong

    def fault(self) -> str:
        """One fault of a kind that is possible at the moment; its name."""
        processes = self.portal.processes()
        kinds = {
            name: [pid for pid, command in processes.items() if word in command]
            for name, word in VICTIMS.items()
        }
        possible = [name for name, pids in kinds.items() if pids and self.victim in (None, name)]
        if not possible:
            return "nothing there"
        if not self.kills:
            possible.append("database")
        kind = self.chance.choice(possible)
        if kind == "database":
            url = os.environ.get("PORTAL_DATABASE_URL")
            return self._close_database(url) if url else self._lock_database()
        numbers = [signal.SIGKILL] if self.kills else [signal.SIGKILL, signal.SIGSTOP]
        number = self.chance.choice(numbers)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.chance.choice(kinds[kind]), number)
        if kind == "supervisor":
            self._start_again(number)
        return f"{kind} {number.name}"

    def _start_again(self, number: int) -> None:
        if number == signal.SIGSTOP:
            time.sleep(self.chance.uniform(1, 10))
            self.portal.process.send_signal(signal.SIGCONT)
        else:
            self.portal.process.wait()
            time.sleep(1)  # the kernel ends the children
            self.portal.start()

    def _lock_database(self) -> str:
        database = sqlite3.connect(self.portal.data_dir / "portal.sqlite3", timeout=60)
        with contextlib.closing(database), contextlib.suppress(sqlite3.OperationalError):
            database.execute("BEGIN EXCLUSIVE")
            time.sleep(self.chance.uniform(5, 35))
            database.rollback()
        return "database locked"

    def _close_database(self, url: str) -> str:
        """What a restart of the server is to its clients: all connections end, and for a while
        nobody gets a new one.
        """
        parts = urlsplit(url)
        name = parts.path.strip("/")
        elsewhere = urlunsplit(parts._replace(path="/postgres"))
        with psycopg.connect(elsewhere, autocommit=True) as server:
            allow = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
            server.execute(allow.format(sql.Identifier(name), sql.SQL("false")))
            try:
                server.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                    [name],
                )
                time.sleep(self.chance.uniform(2, 20))
            finally:
                server.execute(allow.format(sql.Identifier(name), sql.SQL("true")))
        return "database closed"

    # ---- the whole

    def run(self, faults: int, tunings: int, pause: float) -> Figures:
        began = time.monotonic()
        first = self.tune()
        self.ended("tuning-runs", first, 600)
        undisturbed = self._adapters()[first]
        runs = [self.tune() for _ in range(tunings)]
        evaluations = []
        if not self.kills:
            evaluations = [self.evaluate(), self.evaluate(undisturbed["id"])]
        over = threading.Event()
        talking = threading.Thread(target=self.talk, args=(over,), daemon=True)
        if self.chat:
            talking.start()
        for _ in range(faults):
            time.sleep(self.chance.uniform(0.2, pause))
            name = self.fault()
            self.figures.faults[name] = self.figures.faults.get(name, 0) + 1
            print(f"{time.monotonic() - began:7.1f} s  {name}", flush=True)
            # a member goes on putting work in, so that there is something to disturb
            if not any(row["status"] in ("queued", "running") for row in self.all("tuning-runs")):
                runs.append(self.tune())
        told = [self.ended("tuning-runs", run, 900) for run in runs]
        told += [self.ended("evaluation-runs", run, 900) for run in evaluations]
        over.set()
        if self.chat:
            talking.join(300)
        self.figures.runs, self.figures.succeeded = (
            len(told),
            sum(row["status"] == "succeeded" for row in told),
        )
        self._count(runs, evaluations, undisturbed["sha256"])
        self.portal.stop()
        deadline = time.monotonic() + 30
        while self.portal.processes() and time.monotonic() < deadline:
            time.sleep(0.5)
        self.figures.processes_left = len(self.portal.processes())
        self.figures.seconds = round(time.monotonic() - began, 1)
        return self.figures

    def _adapters(self) -> dict[int, dict]:
        return {row["tuning_run"]: row for row in self.all("adapters") if row["tuning_run"]}

    def _count(self, runs: list[int], evaluations: list[int], expected: str) -> None:
        figures, made = self.figures, [row["tuning_run"] for row in self.all("adapters")]
        shas = self._adapters()
        for run in runs:
            figures.done_twice += made.count(run) > 1
            figures.adapters_that_differ += run in shas and shas[run]["sha256"] != expected
            figures.most_steps_repeated = max(figures.most_steps_repeated, self._repeated(run))
        for run in evaluations:
            rows = [row["row"] for row in self.all(f"evaluation-runs/{run}/predictions")]
            figures.done_twice += rows != sorted(set(rows)) or len(rows) != 40
        if self.chat:
            messages = [
                message
                for row in self.all("conversations")
                for message in self.all(f"conversations/{row['id']}/messages")
                if message["role"] == "assistant"
            ]
            figures.messages = len(messages)
            figures.interrupted = sum(row["status"] == "interrupted" for row in messages)
            figures.stuck = sum(row["status"] in ("queued", "streaming") for row in messages)

    def _repeated(self, run: int) -> int:
        """The most steps that an attempt did again."""
        log = self.portal.get(f"/api/v1/tuning-runs/{run}/log/", key=self.key)[1]
        most = reached = 0
        for line in log.splitlines():
            if found := re.search(r"step (\d+)/", line):
                reached = int(found[1])
            elif "parameters are trained" in line:
                before, reached = reached, 0
            elif found := re.search(r"going on after step (\d+)", line):
                most = max(most, before - int(found[1]))
                reached = int(found[1])
        return most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400, help="of one tuning run")
    parser.add_argument("--runs", type=int, default=3, help="tuning runs at the beginning")
    parser.add_argument("--pause", type=float, default=15.0, help="most seconds between two faults")
    parser.add_argument("--kills", action="store_true", help="kill -9 and tuning alone: quick")
    parser.add_argument("--victim", choices=list(VICTIMS), help="this one alone")
    parser.add_argument("--no-chat", action="store_true", help="and no inference worker")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        arguments = ["--no-worker"] if options.no_chat else []
        with Portal(Path(folder) / "data", *arguments, PORTAL_DEVICE="cpu") as portal:
            wait_for(lambda: portal.healthy(worker=not options.no_chat), 240, "the portal")
            chaos = Chaos(portal, Path(folder), options)
            figures = chaos.run(options.faults, options.runs, options.pause)
    print(json.dumps(asdict(figures)))
    return 0 if figures.faultless() else 1


if __name__ == "__main__":
    sys.exit(main())
