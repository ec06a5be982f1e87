"""A client of one worker: submit, events, abort and status over one websocket that comes back by
itself. No torch.

After a gap every reader goes on from the last event it saw; the protocol is in wire.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import aiohttp

from chat.engine.request import (
    CheckpointRef,
    Event,
    GenerationRefused,
    Request,
    RequestRefused,
)
from chat.worker import wire
from chat.worker.wire import Address

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0  # seconds
SUBMIT_TIMEOUT = 120.0  # a cold adapter is read from disk before the reply
RECONNECT_FOR = 30.0  # seconds of failing to reach a worker until its sequences count as lost
LONGEST_PAUSE = 1.0  # seconds between two attempts


class WorkerUnavailable(GenerationRefused):
    """Nobody can take or go on with the request now.

    `code`: worker_unavailable (not there) | worker_loading | no_worker_for_checkpoint |
    sequence_lost
    """

    def __init__(self, message: str, code: str = "worker_unavailable"):
        super().__init__(code, message)


class SequenceLost(WorkerUnavailable):
    """The worker that wrote this sequence is gone, or has forgotten it."""

    def __init__(self, message: str):
        super().__init__(message, "sequence_lost")


class _Reading:
    """A reader of one sequence: events that have arrived and not been taken."""

    __slots__ = ("_arrived", "_error", "_waiter", "id", "last", "number", "socket")

    def __init__(self, number: int, id: str, after: int):
        self.number, self.id = number, id
        self.last = after  # number of the last event that arrived
        # the connection on which it was attached
        self.socket: aiohttp.ClientWebSocketResponse | None = None
        self._arrived: list[Event] = []
        self._error: WorkerUnavailable | None = None
        self._waiter: asyncio.Future[None] | None = None

    def add(self, event: Event) -> None:
        self._arrived.append(event)
        self.last = event.seq
        self._wake()

    def fail(self, error: WorkerUnavailable) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Event]:
        """What has arrived, at least one event. Raises the error once everything before it has been
        taken.
        """
        while not self._arrived:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        news, self._arrived = self._arrived, []
        return news


class WorkerClient:
    """One worker, by its URL."""

    def __init__(self, url: str, token: str, name: str = ""):
        self.address = Address.parse(url)
        self.name = name or str(self.address)
        self._token = token
        self._session: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._connecting = asyncio.Lock()
        self._readings: dict[int, _Reading] = {}
        # of submitted sequences whose events nobody has asked for yet
        self._unclaimed: dict[str, _Reading] = {}
        self._calls: dict[int, asyncio.Future[None]] = {}
        self._numbers = itertools.count()
        self._status: dict[str, Any] = {}
        self._submitted_since_status = 0

    async def submit(self, request: Request, checkpoint: CheckpointRef | None = None) -> None:
        """Returns when the worker has taken the request; RequestRefused when it will not. Read its
        `events` or `abort` it. checkpoint: which it is for (None: whatever is served); a request
        for one that is being loaded waits there.

        Repeating an id that was taken is harmless.
        """
        future = asyncio.get_running_loop().create_future()
        call = next(self._numbers)
        self._calls[call] = future
        # The submitter gets events at once, perhaps before the reply.
        self._readings[call] = reading = _Reading(call, request.id, 0)
        taken = False
        try:
            fields = wire.request_as_dict(request)
            fingerprint = checkpoint.fingerprint if checkpoint is not None else ""
            await self._send(
                {"op": "submit", "call": call, "request": fields, "fingerprint": fingerprint}
            )
            async with asyncio.timeout(SUBMIT_TIMEOUT):
                await future
            taken = True
        except TimeoutError:
            raise WorkerUnavailable(
                f"the worker {self.name} did not decide in {SUBMIT_TIMEOUT:.0f} s"
            ) from None
        finally:
            self._calls.pop(call, None)
            if not taken:
                self._give_up(reading)
        self._unclaimed[request.id] = reading
        self._submitted_since_status += 1

    async def events(self, id: str, after: int = 0) -> AsyncGenerator[list[Event], None]:
        """The sequence's events after number `after`, in handfuls as they come, up to the terminal
        one.

        Survives reconnects. Raises SequenceLost when the worker does not know the sequence (any
        more).
        """
        reading = None if after else self._unclaimed.pop(id, None)
        try:
            if reading is None:
                reading = _Reading(next(self._numbers), id, after)
                self._readings[reading.number] = reading
                await self._attach(reading, await self._connection())
            ended = False
            while not ended:
                news = await reading.take()
                if news[-1].terminal:
                    ended = True
                    self._readings.pop(reading.number, None)
                yield news
        finally:
            if reading is not None:
                self._give_up(reading)

    async def abort(self, id: str) -> None:
        """Ends the sequence; its reader gets the terminal event. Unknown ones are ignored."""
        reading = self._unclaimed.pop(id, None)
        if reading is not None:
            self._give_up(reading)
        await self._send({"op": "abort", "id": id})

    def _give_up(self, reading: _Reading) -> None:
        if self._readings.pop(reading.number, None) is not None:
            self._send_later({"op": "detach", "reading": reading.number})

    async def _attach(self, reading: _Reading, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Once per connection: a second time would repeat what is under way."""
        if reading.socket is not socket:
            reading.socket = socket
            # the next connection does it again
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                frame = {
                    "op": "attach",
                    "reading": reading.number,
                    "id": reading.id,
                    "after": reading.last,
                }
                await socket.send_str(wire.encode(frame))

    def _is_asked(self, reading: _Reading) -> bool:
        """Does the reading belong to a call without a good reply?"""
        future = self._calls.get(reading.number)
        return future is not None and not (future.done() and future.exception() is None)

    async def serves(self, checkpoint: CheckpointRef, *, with_adapter: bool) -> bool:
        await self._connection()
        return (
            self._status.get("state") == "ready"
            and self._status.get("fingerprint") == checkpoint.fingerprint
        )

    async def may_serve(self, checkpoint: CheckpointRef) -> bool:
        """Would a request for it wait there: because it is on its way, or out of memory until
        somebody asks, or because the worker might have been told to serve it just now?
        """
        await self._connection()
        coming, state = self._status.get("coming") or {}, self._status.get("state")
        if coming.get("fingerprint") == checkpoint.fingerprint:
            return True
        if state == "resting" and self._status.get("fingerprint") == checkpoint.fingerprint:
            return True
        return checkpoint.chosen or (state == "loading" and not coming)

    def load(self) -> int:
        """Sequences that run or wait there, as far as is known."""
        known: int = self._status.get("active_rows", 0) + self._status.get("queue", 0)
        return known + self._submitted_since_status

    async def status(self) -> dict[str, Any]:
        """What the worker says of itself, at most about a second old."""
        await self._connection()
        return {**self._status, "name": self.name}

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        for reading in self._readings.values():
            reading.fail(WorkerUnavailable("the client was closed"))
        if self._socket is not None:
            await self._socket.close()
        if self._session is not None:
            await self._session.close()
        self._socket = self._session = None

    # -- the connection

    async def _connection(self) -> aiohttp.ClientWebSocketResponse:
        """The open websocket; opens it, and takes every reading up again, when there is none."""
        async with self._connecting:
            if self._socket is None or self._socket.closed:
                self._socket = await self._connect()
                for reading in tuple(self._readings.values()):
                    if not self._is_asked(reading):
                        await self._attach(reading, self._socket)
                self._keep(self._receive(self._socket))
            return self._socket

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        if self._session is None:
            path = self.address.path and self.address.short_path()
            self._session = aiohttp.ClientSession(
                self.address.base_url,
                connector=aiohttp.UnixConnector(path) if path else aiohttp.TCPConnector(limit=0),
                headers={"Authorization": f"Bearer {self._token}"},
            )
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                socket = await self._session.ws_connect(
                    "/stream", heartbeat=20.0, max_msg_size=wire.LARGEST_FRAME
                )
                self._note(await socket.receive_json())
                return socket
        except aiohttp.WSServerHandshakeError as error:
            reason = "refuses our token" if error.status == 401 else f"answered {error.status}"
            raise WorkerUnavailable(f"the worker {self.name} {reason}") from error
        except (aiohttp.ClientError, OSError, TimeoutError, TypeError, ValueError) as error:
            found = isinstance(
                getattr(error, "os_error", error), (ConnectionRefusedError, FileNotFoundError)
            )
            message = (
                f"nobody listens on {self.address}"
                if found
                else f"{self.address} does not answer: {error!r}"
            )
            raise _NobodyListens(message) if found else WorkerUnavailable(message)  # noqa: B904  the cause is in the text

    async def _send(self, frame: dict[str, Any]) -> None:
        for attempt in (1, 2):
            socket = await self._connection()
            try:
                return await socket.send_str(wire.encode(frame))
            except (ConnectionError, aiohttp.ClientError) as error:
                await socket.close()
                if attempt == 2:
                    raise WorkerUnavailable(
                        f"the connection to {self.name} was lost: {error!r}"
                    ) from error

    def _send_later(self, frame: dict[str, Any]) -> None:
        async def send() -> None:
            with contextlib.suppress(WorkerUnavailable):
                await self._send(frame)

        if self._socket is not None and not self._socket.closed:
            self._keep(send())

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _receive(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        try:
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    break
                self._note(json.loads(message.data))
        except (ConnectionError, aiohttp.ClientError, ValueError) as error:
            log.warning("the connection to %s was lost: %r", self.name, error)
        await socket.close()
        self._status = {}
        for future in self._calls.values():
            if not future.done():
                future.set_exception(WorkerUnavailable(f"the connection to {self.name} was lost"))
        await self._reconnect()

    async def _reconnect(self) -> None:
        """Comes back while somebody reads. Where nobody listens any more, the worker is dead and
        its sequences with it.
        """
        started, pause = time.monotonic(), 0.05
        while self._readings:
            try:
                await self._connection()
                return
            except WorkerUnavailable as error:
                if isinstance(error, _NobodyListens) or time.monotonic() - started > RECONNECT_FOR:
                    for reading in self._readings.values():
                        reading.fail(
                            SequenceLost(f"the worker ended while it was writing ({error})")
                        )
                    self._readings.clear()
                    return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _note(self, frame: dict[str, Any]) -> None:
        """One frame of the worker."""
        for number, seq, kind, data in frame.get("events", ()):
            reading = self._readings.get(number)
            if reading is not None:
                reading.add(Event(reading.id, seq, kind, data))
        if "status" in frame:
            self._status, self._submitted_since_status = frame["status"], 0
        if "call" in frame:
            future = self._calls.get(frame["call"])
            if future is not None and not future.done():
                if frame["error"] is None:
                    future.set_result(None)
                else:
                    future.set_exception(self._refusal(frame["error"]))
        if (
            "unknown" in frame
            and (reading := self._readings.pop(frame["unknown"], None)) is not None
        ):
            reading.fail(SequenceLost(f"the worker {self.name} does not know the sequence"))

    def _refusal(self, error: dict[str, Any]) -> Exception:
        if error["code"] == "no_worker_for_checkpoint":
            return WorkerUnavailable(error["message"], error["code"])
        if error["code"] == "unavailable":
            loading = self._status.get("state") == "loading"
            return WorkerUnavailable(
                error["message"], "worker_loading" if loading else "worker_unavailable"
            )
        return RequestRefused(**error)


class _NobodyListens(WorkerUnavailable):
    """The address refuses connections: the process is gone."""
