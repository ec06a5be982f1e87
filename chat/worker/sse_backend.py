"""A server that answers each HTTP request with one stream of server-sent events, as a backend of
the router. No torch, no Django.

Its stream is translated into the same events as a worker's, kept in a log of this process: readers
come and go as with a worker, but a restart of the web process loses what was in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import aiohttp

from chat.engine.request import (
    CheckpointRef,
    Event,
    EventType,
    Request,
    RequestRefused,
    error_object,
)
from chat.worker.client import SequenceLost, WorkerUnavailable
from chat.worker.event_log import FollowedLog
from chat.worker.openai_stream import Reading, message_of, payloads

CONNECT_TIMEOUT = 10.0  # seconds
SILENCE = 300.0  # seconds without a byte after which an answer counts as dead
KEEP_ENDED = 300.0
UNREACHABLE = (aiohttp.ClientError, OSError, TimeoutError)


class _Sequence(FollowedLog):
    __slots__ = ("task",)

    def __init__(self, id: str):
        super().__init__(id)
        self.task: asyncio.Task[None] | None = None

    def add(self, kind: EventType, data: dict[str, Any]) -> None:
        self.append(Event(self.id, self.last + 1, kind, data))
        self.notify()


class SSEBackend(ABC):
    """`url` is what goes before the endpoints (".../v1"); `key` is sent as a bearer token.
    `reading`: how its chunks are understood.
    """

    reading: type[Reading] = Reading

    def __init__(self, name: str, url: str, key: str = ""):
        self.name, self.url = name, url.rstrip("/")
        self._key = key
        self._session: aiohttp.ClientSession | None = None
        self._sequences: dict[str, _Sequence] = {}

    @abstractmethod
    async def serves(self, checkpoint: CheckpointRef, *, with_adapter: bool) -> bool: ...

    @abstractmethod
    async def submit(self, request: Request, checkpoint: CheckpointRef | None = None) -> None:
        """Returns when the server has begun to answer; RequestRefused, WorkerUnavailable."""

    @abstractmethod
    async def status(self) -> dict[str, Any]: ...

    def load(self) -> int:
        return sum(not sequence.ended for sequence in self._sequences.values())

    async def events(self, id: str, after: int = 0) -> AsyncGenerator[list[Event], None]:
        sequence = self._sequences.get(id)
        if sequence is None:
            raise SequenceLost(f"{self.name} does not know the sequence")
        async for news in sequence.follow(after):
            yield news

    async def abort(self, id: str) -> None:
        sequence = self._sequences.get(id)
        if sequence is not None and sequence.task is not None:
            sequence.task.cancel()  # closes the connection, which is how such servers are told

    async def close(self) -> None:
        tasks = [sequence.task for sequence in self._sequences.values() if sequence.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    # -- for the backends

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                timeout=aiohttp.ClientTimeout(
                    total=None, connect=CONNECT_TIMEOUT, sock_read=SILENCE
                ),
            )
        return self._session

    async def _post(self, endpoint: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
        """The open response, whatever its status."""
        try:
            return await self._client().post(f"{self.url}/{endpoint}", json=body)
        except UNREACHABLE as error:
            raise WorkerUnavailable(f"{self.name} does not answer: {error!r}") from error

    def _follow(
        self,
        id: str,
        response: aiohttp.ClientResponse,
        started: float,
        placeholders: int = 0,
    ) -> None:
        """Takes the answer over. `started`: when it was asked for; `placeholders`: prompt tokens
        that the server counts and the asker did not write.
        """
        sequence = self._sequences[id] = _Sequence(id)
        sequence.task = asyncio.create_task(
            self._translate(sequence, response, started, placeholders)
        )

    def _refuse(self, status: int, text: str) -> None:
        message = message_in(text) or f"{self.name} answered {status}"
        if status in (429, 503):
            raise RequestRefused("queue_full", message, retry_after=5)
        if 400 <= status < 500 and status not in (401, 403, 404):
            code = "context_length_exceeded" if "context" in message.lower() else "invalid_value"
            raise RequestRefused(code, message, "messages")
        raise WorkerUnavailable(f"{self.name} answered {status}: {message}")

    async def _translate(
        self,
        sequence: _Sequence,
        response: aiohttp.ClientResponse,
        started: float,
        placeholders: int,
    ) -> None:
        """The server's SSE stream as events."""
        reading, tokens, first = self.reading(), 0, None
        try:
            async with response:
                async for chunk in _chunks(response):
                    if first is None:
                        first = time.monotonic()
                        sequence.add("started", {"prompt_tokens": 0})
                    for delta in [reading.end()] if chunk is None else reading.take(chunk):
                        if delta is not None:
                            tokens += delta["tokens"]
                            sequence.add("delta", delta)
            if reading.finish_reason is None:
                raise ValueError("its stream ended in the middle of the answer")
            reason = reading.finish_reason
        except asyncio.CancelledError:
            reason = "abort"
        except Exception as error:  # whatever a server invents, its readers are told of the end
            failed = error_object(f"{self.name}: {error}", "upstream_error")
            sequence.add("failed", {"error": failed})
            return
        finally:
            asyncio.get_running_loop().call_later(
                KEEP_ENDED, self._sequences.pop, sequence.id, None
            )
        now = time.monotonic()
        spent = now - (first or now)
        completion = reading.usage.get("completion_tokens", tokens)
        prompt = max(0, reading.usage.get("prompt_tokens", 0) - placeholders)
        timings = {
            "queued_s": 0.0,
            "prefill_s": round((first or now) - started, 4),
            "decode_s": round(spent, 4),
            "tokens_per_second": round(completion / spent, 2) if spent else 0.0,
        }
        counts = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        sequence.add("finished", {"finish_reason": reason, "usage": counts, "timings": timings})


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    """The stream's JSON values, None at its end. A server that does not stream has one."""
    if response.content_type == "application/json":
        yield await response.json()
        yield None
        return
    async for chunk in payloads(response.content.iter_any()):
        yield chunk


def message_in(text: str) -> str:
    with contextlib.suppress(ValueError):
        return message_of(json.loads(text))
    return ""
