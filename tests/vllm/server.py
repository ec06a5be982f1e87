"""A real vLLM server as a process, and what the tests ask of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tests.support.live_portal import free_port
from tests.vllm import environment

START = 400  # seconds; importing vLLM alone takes half a minute on a busy machine


@dataclass(frozen=True)
class Ask:
    """prefix: (sha256, length) or None."""

    prompt: tuple[int, ...]
    tokens: int
    prefix: tuple[str, int] | None = None

    def body(self) -> dict:
        body = {
            "prompt": list(self.prompt),
            "max_tokens": self.tokens,
            "temperature": 0,
            "return_token_ids": True,
        }
        if self.prefix is not None:
            name, length = self.prefix
            body["prompt"] = [self.prompt[0]] * length + body["prompt"]
            body |= {"kv_transfer_params": {"prefix": name, "length": length}, "cache_salt": name}
        return body


def command(model: Path, adapters: Path, *arguments: str, **config) -> list[str]:
    """Of a small server with the connector; `config`: what is otherwise in its settings."""
    transfer = {**environment.kv_transfer_config(adapters), **config}
    return [
        *(str(environment.python()), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--dtype", "float32", "--max-model-len", "1024"),
        *("--max-num-seqs", "32", "--enforce-eager", "--host", "127.0.0.1"),
        *("--kv-transfer-config", json.dumps(transfer), *arguments),
    ]


class VllmServer:
    """`with VllmServer(command, log) as server:`; without `port`, one is put behind the command."""

    def __init__(self, command: list[str], log: Path, port: int | None = None, **variables: str):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = command if port else [*command, "--port", str(self.port)]
        self.log, self.variables = log, variables
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> VllmServer:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()  # nothing may be left running
            raise
        return self

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["nice", *self.command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment.variables(**self.variables),
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(
                    f"vLLM ended with {self.process.returncode}:\n{self.output()[-3000:]}"
                )
            try:
                with urlopen(f"{self.url}/health", timeout=5):
                    return
            except (URLError, OSError):
                time.sleep(0.5)
        raise AssertionError(f"vLLM was not ready in {START} s:\n{self.output()[-3000:]}")

    def __exit__(self, *error) -> None:
        self.stop()

    def stop(self) -> None:
        """The whole session: vLLM's engine is a child of its server."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def post(self, body: dict):
        """(status, the answer)."""
        request = Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            answer = urlopen(request, timeout=300)
        except HTTPError as error:
            answer = error
        with answer:
            return answer.status, json.loads(answer.read())

    def stream(self, body: dict):
        """The open response; closing it is how vLLM is told to stop."""
        body = json.dumps({**body, "stream": True}).encode()
        return urlopen(
            Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"}),
            timeout=300,
        )

    def tokens(self, ask: Ask) -> tuple[int, ...]:
        status, answer = self.post(ask.body())
        assert status == 200, answer
        return tuple(answer["choices"][0]["token_ids"])

    def all_tokens(self, asks: list[Ask]) -> list[tuple[int, ...]]:
        """Asked all at once, so that they share batches."""
        with ThreadPoolExecutor(len(asks)) as threads:
            return list(threads.map(self.tokens, asks))

    def metric(self, name: str, **labels: str) -> float:
        """Sum of `vllm:name` over its series that have the labels."""
        with urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = re.findall(
                rf"^vllm:{name}(\{{.*\}})? (\S+)$", answer.read().decode(), re.MULTILINE
            )
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            float(value) for series, value in lines if all(label in series for label in wanted)
        )
