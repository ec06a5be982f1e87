"""The web tier's only way to inference: submit, events, abort and status, over one or several
workers. No torch, no Django.

A `Router` chooses among workers (chat/worker/client.py), vLLM servers (vllm_backend.py) and other
OpenAI-compatible servers (openai_backend.py) by checkpoint, then by load. It belongs to one event
loop; `get_router()` gives the running loop's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import urllib.request
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from chat.engine.request import (
    CheckpointRef,
    Event,
    GenerationRefused,
    Request,
    RequestRefused,
)
from chat.worker.addresses import WorkerAddress
from chat.worker.client import SequenceLost, WorkerClient, WorkerUnavailable
from chat.worker.event_log import coalesced
from chat.worker.openai_backend import OpenAIBackend
from chat.worker.prompt_renderer import PromptRenderer, Renderer
from chat.worker.vllm_backend import VllmBackend, models_in, status_of
from chat.worker.wire import Address

__all__ = [
    "CheckpointRef",
    "OpenAIBackend",
    "RequestRefused",
    "Router",
    "SequenceLost",
    "WorkerClient",
    "WorkerSettings",
    "WorkerUnavailable",
    "coalesced",
    "configure",
    "get_router",
    "status_sync",
]


class Backend(Protocol):
    """A server of sequences: WorkerClient, VllmBackend or OpenAIBackend. Methods may raise
    WorkerUnavailable.
    """

    name: str

    async def serves(self, checkpoint: CheckpointRef, *, with_adapter: bool) -> bool: ...
    def load(self) -> int: ...
    async def submit(self, request: Request, checkpoint: CheckpointRef | None = None) -> None: ...
    def events(self, id: str, after: int = 0) -> AsyncGenerator[list[Event], None]: ...
    async def abort(self, id: str) -> None: ...
    async def status(self) -> dict[str, Any]: ...
    async def close(self) -> None: ...


class Router:
    """Several backends as one: by checkpoint, then by load."""

    def __init__(
        self,
        urls: Sequence[str],
        token: str,
        remotes: Sequence[str] = (),
        remote_key: str = "",
        renderer: Renderer | None = None,
    ):
        """renderer: of prompts for vLLM servers; None: a process of ours."""
        self._own_renderer: PromptRenderer | None = None
        if renderer is None:
            renderer = self._own_renderer = PromptRenderer()
        self.backends: list[Backend] = [
            VllmBackend(address.url, token, renderer, address.name)
            if address.vllm
            else WorkerClient(address.url, token, address.name)
            for address in map(WorkerAddress.parse, urls)
        ]
        self.backends += (OpenAIBackend.parse(entry, remote_key) for entry in remotes)
        # of sequences submitted here, until their events have been read
        self._backends_by_id: dict[str, Backend] = {}

    async def submit(self, request: Request, checkpoint: CheckpointRef) -> None:
        """Gives the request to the least loaded backend that serves `checkpoint`, or to a worker
        that is loading it, where it waits; RequestRefused, WorkerUnavailable.
        """
        candidates = await self._candidates(checkpoint, with_adapter=request.adapter is not None)
        for i, backend in enumerate(candidates):
            self._backends_by_id[request.id] = backend
            try:
                return await backend.submit(request, checkpoint)
            except GenerationRefused as error:
                del self._backends_by_id[request.id]
                full = isinstance(error, WorkerUnavailable) or error.code == "queue_full"
                if not full or i + 1 == len(candidates):
                    raise

    async def holding(self, checkpoint: CheckpointRef, *, with_adapter: bool) -> list[Backend]:
        """The backends that have it just now."""
        answers = await self._answers(checkpoint, with_adapter)
        return [
            backend
            for backend, answer in zip(self.backends, answers, strict=True)
            if answer is True
        ]

    async def _answers(self, checkpoint: CheckpointRef, with_adapter: bool) -> list[Any]:
        """Of each backend: whether it has it, or why it cannot say."""
        return await asyncio.gather(
            *(backend.serves(checkpoint, with_adapter=with_adapter) for backend in self.backends),
            return_exceptions=True,
        )

    async def events(self, id: str, after: int = 0) -> AsyncGenerator[list[Event], None]:
        """As WorkerClient.events, wherever the sequence is. SequenceLost when nobody knows it."""
        known = self.backend_of(id)
        error: WorkerUnavailable = SequenceLost(f"nobody knows the sequence {id}")
        for backend in [known] if known else self.backends:
            self._backends_by_id[id] = backend
            begun = False
            try:
                async with contextlib.aclosing(backend.events(id, after)) as handfuls:
                    async for news in handfuls:
                        begun = True
                        yield news
                return
            except SequenceLost:
                if begun or known:
                    raise
            except WorkerUnavailable as unavailable:
                if begun:
                    raise
                error = unavailable  # it may know the sequence; only when all deny it, it is lost
            finally:
                self._backends_by_id.pop(id, None)
        raise error

    def backend_of(self, id: str) -> Backend | None:
        """Where a sequence that was submitted here runs, until its events have been read."""
        return self._backends_by_id.get(id)

    async def abort(self, id: str) -> None:
        known = self.backend_of(id)
        for backend in [known] if known else self.backends:
            with contextlib.suppress(*([] if known else [WorkerUnavailable])):
                await backend.abort(id)

    async def status(self) -> list[dict[str, Any]]:
        """One entry per backend; one that does not answer has state "unavailable" and a reason."""
        return await asyncio.gather(*(_status_or_reason(backend) for backend in self.backends))

    async def close(self) -> None:
        await asyncio.gather(*(backend.close() for backend in self.backends))
        if self._own_renderer is not None:
            await self._own_renderer.close()

    async def _candidates(self, checkpoint: CheckpointRef, *, with_adapter: bool) -> list[Backend]:
        answers = await self._answers(checkpoint, with_adapter)
        fitting = [
            backend
            for backend, answer in zip(self.backends, answers, strict=True)
            if answer is True
        ]
        if fitting:
            return sorted(fitting, key=lambda backend: backend.load())
        if coming := await self._where_it_waits(checkpoint):
            return coming
        for answer in answers:
            if isinstance(answer, WorkerUnavailable) and answer.code == "no_worker_for_checkpoint":
                raise answer  # it says why, of this very checkpoint
        states = await self.status()
        if any(state["state"] == "loading" for state in states):
            raise WorkerUnavailable("the worker is loading its checkpoint", "worker_loading")
        ready = [state.get("checkpoint") for state in states if state["state"] == "ready"]
        if ready:
            served = ", ".join(map(str, ready))
            message = f"no worker serves the checkpoint {checkpoint.name}; served: {served}"
            raise WorkerUnavailable(message, "no_worker_for_checkpoint")
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        raise WorkerUnavailable(
            "; ".join(str(state.get("reason") or state["state"]) for state in states) or "no worker"
        )

    async def _where_it_waits(self, checkpoint: CheckpointRef) -> list[Backend]:
        """Workers that are loading it, or would."""
        workers = [backend for backend in self.backends if isinstance(backend, WorkerClient)]
        answers = await asyncio.gather(
            *(worker.may_serve(checkpoint) for worker in workers), return_exceptions=True
        )
        found = zip(workers, answers, strict=True)
        return sorted((w for w, answer in found if answer is True), key=lambda w: w.load())


async def _status_or_reason(backend: Backend) -> dict[str, Any]:
    try:
        return await backend.status()
    except WorkerUnavailable as error:
        return {"name": backend.name, "state": "unavailable", "reason": error.message}


# -- the configured workers


@dataclass(frozen=True)
class WorkerSettings:
    """Where the workers are: the portal's settings of the same names."""

    worker_urls: tuple[str, ...]
    worker_token: str
    remotes: tuple[str, ...] = ()
    remote_key: str = ""


_worker_settings: Callable[[], WorkerSettings] | None = None
_routers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[WorkerSettings, Router]] = (
    weakref.WeakKeyDictionary()
)


def configure(settings: Callable[[], WorkerSettings]) -> None:
    """Says where `get_router` and `status_sync` find the workers; asked anew each time."""
    global _worker_settings
    _worker_settings = settings


def _settings() -> WorkerSettings:
    if _worker_settings is None:
        raise RuntimeError("chat.worker.router.configure() has not been called")
    return _worker_settings()


def get_router() -> Router:
    """The running event loop's router to the configured workers."""
    loop, now = asyncio.get_running_loop(), _settings()
    known = _routers.get(loop)
    if known is not None:
        settings, router = known
        if settings == now:
            return router
        loop.create_task(router.close())
    router = Router(now.worker_urls, now.worker_token, now.remotes, now.remote_key)
    _routers[loop] = (now, router)
    return router


def connect(timeout: float) -> socket.socket:
    """A connection to the first configured worker, for `up`, which starts it. OSError."""
    addresses = map(WorkerAddress.parse, _settings().worker_urls)
    first = next(address for address in addresses if not address.vllm)
    return Address.parse(first.url).connect(timeout)


def status_sync(timeout: float = 2.0) -> dict[str, Any]:
    """What the configured workers say, without an event loop. Raises WorkerUnavailable when none
    answers.

    With one worker its own status; with several the first ready one's, and all of them under
    "workers".
    """
    now, answers, reasons = _settings(), [], []
    for entry in map(WorkerAddress.parse, now.worker_urls):
        try:
            if entry.vllm:
                status = _get_vllm_status(entry.url, now.worker_token, timeout)
            else:
                status = _get_status(Address.parse(entry.url), now.worker_token, timeout)
            answers.append({**status, "name": entry.name or entry.url})
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            reasons.append(f"{entry.name or entry.url}: {reason}")
    if not answers:
        raise WorkerUnavailable("; ".join(reasons) or "no worker is configured")
    answers.sort(key=lambda status: status["state"] != "ready")
    return answers[0] if len(now.worker_urls) == 1 else {**answers[0], "workers": answers}


def _get_status(address: Address, token: str, timeout: float) -> dict[str, Any]:
    connection = http.client.HTTPConnection(address.host or "worker", timeout=timeout)
    connection.sock = address.connect(timeout)
    try:
        connection.request("GET", "/status", headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"the worker answered {answer.status}")
        status: dict[str, Any] = json.load(answer)
        return status
    finally:
        connection.close()


def _get_vllm_status(url: str, key: str, timeout: float) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url.rstrip('/')}/v1/models", headers={"Authorization": f"Bearer {key}"}
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return status_of(url, models_in(json.load(answer)))
