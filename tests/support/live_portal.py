"""The portal as people run it: `manage.py up` as a subprocess with a data folder of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tests.support import ROOT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds: float, what: str):
    """The first true value of `condition()`; AssertionError naming `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}")


class Portal:
    """`with Portal(folder) as portal:` runs until the block ends; then nothing may be left of
    it.
    """

    def __init__(self, data_dir: Path, *arguments: str, **environment: str):
        self.data_dir, self.port = Path(data_dir), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.arguments = arguments
        self.environment = {
            **os.environ,
            "PORTAL_DATA_DIR": str(data_dir),
            "PYTHONUNBUFFERED": "1",
            **environment,
        }
        self.log = self.data_dir / "up.log"
        self.process: subprocess.Popen | None = None

    def __enter__(self):
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, *error):
        self.stop()

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "up", "--port", str(self.port), *self.arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self, number: int = signal.SIGTERM):
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(120)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def password(self) -> str:
        """The first administrator's, as `up` printed it."""
        pattern = re.compile(r"(?:密码|password)[:：]\s*(\S+)")
        return wait_for(
            lambda: pattern.search(self.output()), 60, "the first administrator's password"
        ).group(1)

    def manage(self, *arguments: str, **options) -> str:
        return subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=ROOT,
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
            **options,
        ).stdout

    def get(self, path: str, key: str | None = None, **options):
        return self.call("GET", path, key=key, **options)

    def call(self, method: str, path: str, body=None, key: str | None = None, headers=None):
        """(status, parsed JSON or text)."""
        headers = dict(headers or {})
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = body
        if body is not None and not isinstance(body, bytes):
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = Request(self.url + path, data=data, method=method, headers=headers)
        try:
            answer = urlopen(request, timeout=60)
        except HTTPError as error:
            answer = error
        with answer:
            text = answer.read().decode()
            is_json = "json" in answer.headers.get("Content-Type", "")
            return answer.status, json.loads(text) if is_json and text else text

    def healthy(self, worker: bool = True):
        """The health report once the web (and the model) answers, else None."""
        try:
            report = self.get("/healthz")[1]
        except (URLError, OSError):
            return None
        return report if not worker or report["worker"].get("state") == "ready" else None

    def processes(self) -> dict[int, str]:
        """pid -> command line of everything that runs on this data folder."""
        found, mark = {}, f"PORTAL_DATA_DIR={self.data_dir}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        command = (
                            (entry / "cmdline")
                            .read_bytes()
                            .replace(b"\0", b" ")
                            .decode(errors="replace")
                            .strip()
                        )
                        if command:  # a zombie has none
                            found[int(entry.name)] = command
                except (OSError, PermissionError):
                    continue
        return found

    def pid_of(self, word: str) -> int:
        return min(pid for pid, command in self.processes().items() if word in command)


def upload(portal, key, rows: list[dict], **fields):
    """POST of a multipart form, as curl -F does it."""
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file = Path(portal.data_dir) / "upload.json"
    file.write_text(lines, encoding="utf-8")
    form = [part for name, value in fields.items() for part in ("-F", f"{name}={value}")]
    command = [
        "curl",
        "-sS",
        "-w",
        "\n%{http_code}",
        "-H",
        f"Authorization: Bearer {key}",
        "-F",
        f"file=@{file}",
        *form,
    ]
    answer = subprocess.run(
        [*command, f"{portal.url}/api/v1/datasets/"], capture_output=True, text=True, check=True
    ).stdout
    body, status = answer.rsplit("\n", 1)
    return int(status), json.loads(body)


def finished(portal, key, path: str, seconds: float) -> dict:
    """The run behind `path` once it has ended."""

    def ended():
        run = portal.get(path, key=key)[1]
        return run if run["status"] not in ("queued", "running") else None

    return wait_for(ended, seconds, path)
