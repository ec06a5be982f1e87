"""An OpenAI-compatible server (vLLM, SGLang, `transformers serve`) as the server of a plain base
checkpoint. No Django.

Its stream is translated into the same events as a worker's, kept in a log of this process: readers
come and go as with a worker, but a restart of the web process loses what was in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
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
from chat.worker.addresses import RemoteAddress
from chat.worker.client import SequenceLost, WorkerUnavailable
from chat.worker.event_log import FollowedLog

CONNECT_TIMEOUT = 10.0  # seconds
SILENCE = 300.0  # seconds without a byte after which an answer counts as dead
KEEP_ENDED = 300.0
# beyond OpenAI's fields; vLLM and SGLang know them, `transformers serve` refuses
EXTRAS = (
    "top_k",
    "repetition_penalty",
)
# everything else that others invent counts as "stop"
FINISHED = {"stop": "stop", "length": "length"}


class _Sequence(FollowedLog):
    __slots__ = ("task",)

    def __init__(self, id: str):
        super().__init__(id)
        self.task: asyncio.Task[None] | None = None

    def add(self, kind: EventType, data: dict[str, Any]) -> None:
        self.append(Event(self.id, self.last + 1, kind, data))
        self.notify()


class OpenAIBackend:
    """`url` is what goes before /chat/completions (".../v1"), `model` what that server calls the
    checkpoint.
    """

    def __init__(self, checkpoint: str, url: str, model: str, key: str = ""):
        self.checkpoint, self.model = checkpoint, model
        self.url = url.rstrip("/")
        self.name = f"{checkpoint} at {self.url}"
        self._key = key
        self._extras = True
        self._session: aiohttp.ClientSession | None = None
        self._sequences: dict[str, _Sequence] = {}

    @classmethod
    def parse(cls, entry: str, key: str = "") -> OpenAIBackend:
        """An entry of PORTAL_UPSTREAMS; ValueError when it is none."""
        remote = RemoteAddress.parse(entry)
        return cls(remote.checkpoint, remote.url, remote.model, key)

    async def serves(self, checkpoint: CheckpointRef, *, with_adapter: bool) -> bool:
        return checkpoint.name == self.checkpoint and not with_adapter

    def load(self) -> int:
        return sum(not sequence.ended for sequence in self._sequences.values())

    async def submit(self, request: Request) -> None:
        """Returns when the server has begun to answer; RequestRefused, WorkerUnavailable."""
        if request.prompt_ids is not None:
            raise RequestRefused(
                "invalid_value", f"{self.name} takes messages, not token ids", "prompt_ids"
            )
        started = time.monotonic()
        response = await self._post(request)
        if response.status != 200:
            async with response:
                status, text = response.status, await response.text(errors="replace")
            if not (status in (400, 422) and self._extras and any(name in text for name in EXTRAS)):
                self._refuse(status, text)
            self._extras = False  # a strict server: OpenAI's own fields only, from now on
            return await self.submit(request)
        sequence = self._sequences[request.id] = _Sequence(request.id)
        sequence.task = asyncio.create_task(self._translate(sequence, response, started))

    async def _post(self, request: Request) -> aiohttp.ClientResponse:
        try:
            return await self._client().post(
                f"{self.url}/chat/completions", json=self._body(request)
            )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise WorkerUnavailable(f"{self.name} does not answer: {error!r}") from error

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

    async def status(self) -> dict[str, Any]:
        try:
            async with self._client().get(f"{self.url}/models") as response:
                state = "ready" if response.status == 200 else "unavailable"
                reason = "" if response.status == 200 else f"answered {response.status}"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            state, reason = "unavailable", repr(error)
        return {
            "name": self.name,
            "state": state,
            "reason": reason,
            "checkpoint": self.checkpoint,
            "queue": 0,
            "active_rows": self.load(),
        }

    async def close(self) -> None:
        tasks = [sequence.task for sequence in self._sequences.values() if sequence.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

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

    def _body(self, request: Request) -> dict[str, Any]:
        """OpenAI's fields, and the EXTRAS where the server takes them."""
        sampling = request.sampling
        greedy = not sampling.do_sample or sampling.temperature == 0
        body = {
            "model": self.model,
            "messages": list(request.messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.0 if greedy else sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": sampling.seed,
            "stop": list(sampling.stop) or None,
        }
        if self._extras:
            penalty = sampling.repetition_penalty
            body |= {
                "top_k": sampling.top_k or None,
                "repetition_penalty": penalty if penalty != 1.0 else None,
            }
        if sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
        return {name: value for name, value in body.items() if value is not None}

    def _refuse(self, status: int, text: str) -> None:
        message = _message_in(text) or f"{self.name} answered {status}"
        if status in (429, 503):
            raise RequestRefused("queue_full", message, retry_after=5)
        if 400 <= status < 500 and status not in (401, 403, 404):
            code = "context_length_exceeded" if "context" in message.lower() else "invalid_value"
            raise RequestRefused(code, message, "messages")
        raise WorkerUnavailable(f"{self.name} answered {status}: {message}")

    async def _translate(
        self, sequence: _Sequence, response: aiohttp.ClientResponse, started: float
    ) -> None:
        """The server's SSE stream as events."""
        reason, usage, tokens, first = None, None, 0, None
        try:
            async with response:
                async for chunk in _chunks(response):
                    if "error" in chunk:
                        raise ValueError(
                            _message_in(json.dumps(chunk)) or "the server reported an error"
                        )
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices") or ():
                        text = (choice.get("delta") or {}).get("content")
                        if first is None:
                            first = time.monotonic()
                            sequence.add("started", {"prompt_tokens": 0})
                        if text:
                            tokens += 1
                            data = {"text": text, "tokens": 1}
                            logprobs = (choice.get("logprobs") or {}).get("content")
                            sequence.add(
                                "delta", data | ({"logprobs": logprobs} if logprobs else {})
                            )
                        if choice.get("finish_reason"):
                            reason = FINISHED.get(choice["finish_reason"], "stop")
            if reason is None:
                raise ValueError("its stream ended in the middle of the answer")
        except asyncio.CancelledError:
            reason = "abort"
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            failed = error_object(f"{self.name}: {error}", "upstream_error")
            sequence.add("failed", {"error": failed})
            return
        finally:
            asyncio.get_running_loop().call_later(
                KEEP_ENDED, self._sequences.pop, sequence.id, None
            )
        now = time.monotonic()
        spent = now - (first or now)
        counts = {
            name: (usage or {}).get(name, 0)
            for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        }
        if usage is None:
            counts |= {"completion_tokens": tokens, "total_tokens": tokens}
        timings = {
            "queued_s": 0.0,
            "prefill_s": round((first or now) - started, 4),
            "decode_s": round(spent, 4),
            "tokens_per_second": round(counts["completion_tokens"] / spent, 2) if spent else 0.0,
        }
        sequence.add("finished", {"finish_reason": reason, "usage": counts, "timings": timings})


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream, up to [DONE]."""
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        payload = line[5:].strip()
        if payload == b"[DONE]":
            return
        yield json.loads(payload)


def _message_in(text: str) -> str:
    """The message of an error body, whichever of the usual forms it has."""
    with contextlib.suppress(ValueError, AttributeError):
        body = json.loads(text)
        error = body.get("error", body)
        return (
            str(error.get("message") or error.get("detail") or "")
            if isinstance(error, dict)
            else str(error)
        )
    return ""
