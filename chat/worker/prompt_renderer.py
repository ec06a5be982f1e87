"""Prompts of checkpoints that a server without our rendering serves, by a small process of ours. No
torch, no Django.

The web process must not import transformers, and the server's own rendering is not ours: it makes
control tokens of user text, and need not be what training saw (docs/adr/0005). The process holds
tokenizers only, starts with the first prompt and ends with its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from chat.engine.request import Request, RequestRefused
from chat.worker.client import WorkerUnavailable

ROOT = Path(__file__).resolve().parents[2]
LARGEST_LINE = 64 * 1024 * 1024  # bytes
PATIENCE = 60.0  # seconds; the first prompt of a checkpoint waits for imports and the tokenizer


@dataclass(frozen=True)
class Rendered:
    """ids: the prompt, up to where the answer begins. end_ids: tokens that end an answer.
    json_schema: what the answer must satisfy, if anything.
    """

    ids: list[int]
    end_ids: list[int]
    json_schema: str | None = None


def asked(request: Request) -> dict[str, Any]:
    """What chat.engine.prompt_process reads of a request."""
    return {
        "messages": request.messages,
        "text": request.text,
        "begun": request.begun,
        "thinking": request.sampling.thinking,
        "tools": request.tools,
        "must_call": request.must_call,
        "json_schema": request.sampling.json_schema,
    }


class Renderer(Protocol):
    async def render(self, folder: str, request: Request) -> Rendered:
        """The prompt of a checkpoint: of messages and what there is of the answer, or of a text to
        be gone on with; of neither, `ids` is empty.

        Raises RequestRefused, and WorkerUnavailable when the folder has no tokenizer that can be
        used.
        """


class PromptRenderer:
    """A Renderer that has a process for it. Belongs to one event loop."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()

    async def render(self, folder: str, request: Request) -> Rendered:
        pipe = (await self._running()).stdin
        assert pipe is not None
        number, future = next(self._numbers), asyncio.get_running_loop().create_future()
        self._calls[number] = future
        call = {"call": number, "folder": folder, **asked(request)}
        try:
            pipe.write(json.dumps(call).encode() + b"\n")
            async with asyncio.timeout(PATIENCE):
                await pipe.drain()
                answer = await future
        except (OSError, TimeoutError) as error:
            raise WorkerUnavailable(f"the process that renders prompts hangs: {error!r}") from error
        finally:
            self._calls.pop(number, None)
        if "refused" in answer:
            raise RequestRefused(**answer["refused"])
        if "error" in answer:
            raise WorkerUnavailable(f"no prompts can be made for {folder}: {answer['error']}")
        return Rendered(answer["ids"], answer["end_ids"], answer["json_schema"])

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()  # its signal to end
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
        if self._reader is not None:
            await self._reader

    async def _running(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "chat.engine.prompt_process"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    cwd=ROOT,
                    limit=LARGEST_LINE,
                )
                self._reader = asyncio.create_task(self._read(self._process))
            return self._process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            answer = json.loads(line)
            future = self._calls.get(answer["call"])
            if future is not None and not future.done():
                future.set_result(answer)
        await process.wait()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(
                    WorkerUnavailable("the process that renders prompts has ended")
                )
