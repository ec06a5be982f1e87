"""Part of `python -m tests.bench.engine`: 16 clients over server-sent events, the whole portal
against `transformers serve`.

Both servers run the same folder with one torch thread, each as people start it: ours is `manage.py
up` (web, worker, queues), theirs `transformers serve --continuous-batching`. They take turns; while
one answers, the other idles. A client asks again as soon as it has its answer. Time to first token
is from sending the request to the first chunk with text, in wall time.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import aiohttp
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from tests.support.live_portal import Portal, free_port, wait_for

CLIENTS = 16
ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Question:
    text: str
    tokens: int  # of the answer


def questions(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> list[Question]:
    """Prompts of about 16 to 96 tokens, answers of 32 to 128."""
    draw = random.Random(seed)
    return [
        Question(
            tokenizer.decode(
                [draw.randrange(300, len(tokenizer)) for _ in range(draw.randint(16, 96))]
            ),
            draw.randint(32, 128),
        )
        for _ in range(count)
    ]


async def ask(session: aiohttp.ClientSession, url: str, model: str, question: Question) -> float:
    """Seconds to the first text of one answer, which is read to its end. `transformers serve`
    begins with the prompt: no answer.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question.text}],
        "stream": True,
        "temperature": 0,
        "max_tokens": question.tokens,
    }
    began, first = time.perf_counter(), None
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            choices = json.loads(line[6:]).get("choices")
            text = choices[0]["delta"].get("content") if choices else None
            if first is None and text and text.strip() != question.text.strip():
                first = time.perf_counter() - began
    assert first is not None, "an answer without text"
    return first


async def first_tokens(url: str, model: str, key: str, work: list[Question]) -> list[float]:
    """Times to first token of all questions, at most CLIENTS at once."""
    waiting, waits = iter(work), []

    async def client(session: aiohttp.ClientSession) -> None:
        for question in waiting:
            waits.append(await ask(session, url, model, question))

    timeout = aiohttp.ClientTimeout(total=600)
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
    return waits


class TransformersServe:
    """`with TransformersServe(folder, log) as url:`"""

    def __init__(self, folder: Path, log: Path):
        self.folder, self.log, self.port = folder, log, free_port()

    def __enter__(self) -> str:
        program = shutil.which("transformers", path=Path(sys.executable).parent)
        command = [
            program,
            "serve",
            str(self.folder),
            "--continuous-batching",
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                stdout=log,
                stderr=log,
                env={**os.environ, **ONE_THREAD, "HF_HOME": str(self.folder.parent / "hub")},
            )
        wait_for(self._answers, 120, f"transformers serve ({self.log})")
        return f"http://127.0.0.1:{self.port}"

    def _answers(self) -> bool:
        try:
            urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
            return True
        except (URLError, OSError):
            return False

    def __exit__(self, *error) -> None:
        self.process.terminate()
        self.process.wait(30)


def measure(
    folder: Path,
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rounds: int,
    asked: int,
) -> Iterator[dict[str, list[float]]]:
    """For each round the times to first token, in seconds, of `asked` questions: "ours" and
    "serve".
    """
    checkpoint = folder / "checkpoint"
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(checkpoint)
    model.save_pretrained(checkpoint)
    portal = Portal(folder / "portal", **ONE_THREAD)
    portal.data_dir.mkdir()
    portal.manage("migrate")
    portal.manage("add_checkpoint", str(checkpoint), "--name", "bench", "--default")
    with portal, TransformersServe(checkpoint, folder / "serve.log") as serve:
        portal.password()
        key = portal.manage("create_api_key", "admin").strip()
        wait_for(portal.healthy, 60, "the worker")
        servers = {"ours": (portal.url, "bench"), "serve": (serve, str(checkpoint))}
        for number in range(-1, rounds):  # the first one warms both up
            work = questions(tokenizer, asked, number)
            waits = {
                name: asyncio.run(first_tokens(url, named, key, work))
                for name, (url, named) in servers.items()
            }
            if number >= 0:
                yield waits
