"""The worker's server: lets many clients submit, follow and abort sequences of one engine. The
protocol is in wire.py.

The socket is bound before the model is loaded, so that whoever asks is told "loading" instead of
finding nobody. The engine's thread only appends to logs and rings a bell; it never waits for a
reader. Each client's frames are made when that client can take them, from the logs, so a slow
reader gets fewer, larger frames and costs no memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

from aiohttp import WSMsgType, web

from chat.engine.request import Event, Request, RequestRefused, Sink
from chat.worker import wire
from chat.worker.event_log import EventLog

log = logging.getLogger(__name__)

GRACE = 30.0  # seconds that a sequence goes on without a reader
KEEP_ENDED = 300.0  # seconds that an ended log can still be read
KEEP_CHARACTERS = 64_000_000  # of text in ended logs; the oldest go first
# seconds between two frames to one client: joins what other threads deliver one by one
FRAME_GAP = 0.003
STATUS_INTERVAL = 1.0

# Exit codes of the worker's process; the supervisor starts it again after each.
EXIT_STOPPED, EXIT_FAILED, EXIT_REPLACED = 0, 1, 3


class EngineLike(Protocol):
    """What the server needs of chat.engine.engine.Engine."""

    def submit(self, request: Request, sink: Sink) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def status(self) -> dict[str, Any]: ...
    def run_forever(self, stop_event: threading.Event) -> None: ...
    def close(self) -> None: ...


class Held:
    """A sequence's log with its readers. `cause`: why the worker itself ended the sequence, added
    to its terminal event.
    """

    __slots__ = ("cause", "ended_at", "log", "readers", "unread_since")

    def __init__(self, id: str):
        self.log = EventLog(id)
        self.readers: set[Reader] = set()
        self.unread_since: float | None = None
        self.ended_at: float | None = None
        self.cause: str | None = None


class Reader:
    """One reading of a sequence by a client; `after` is the last event that was put into a frame
    for it.
    """

    __slots__ = ("after", "client", "held", "number")

    def __init__(self, client: Client, number: int, held: Held, after: int):
        self.client, self.number, self.held, self.after = client, number, held, after
        client.readers[number] = self
        held.readers.add(self)
        held.unread_since = None

    def leave(self) -> None:
        self.client.readers.pop(self.number, None)
        self.held.readers.discard(self)
        if not self.held.readers and not self.held.log.ended:
            self.held.unread_since = time.monotonic()


class Client:
    """One websocket: what it reads, and the task that writes its frames."""

    def __init__(self, socket: web.WebSocketResponse):
        self.socket = socket
        self.readers: dict[int, Reader] = {}
        # those that may have something to read, in order of arrival
        self.news: dict[Reader, None] = {}
        self.control: list[dict[str, Any]] = []  # frames other than events
        self.wake = asyncio.Event()

    def tell(self, frame: dict[str, Any]) -> None:
        self.control.append(frame)
        self.wake.set()

    def notice(self, reader: Reader) -> None:
        self.news[reader] = None
        self.wake.set()

    async def write(self) -> None:
        while True:
            await self.wake.wait()
            self.wake.clear()
            control, self.control = self.control, []
            for frame in control:
                await self.socket.send_str(wire.encode(frame))
            news, self.news = self.news, {}
            events = []
            for reader in news:
                if reader not in reader.held.readers:
                    continue
                for event in reader.held.log.since(reader.after):
                    events.append([reader.number, event.seq, event.type, event.data])
                    reader.after = event.seq
                if reader.held.log.ended:
                    reader.leave()
            if events:
                await self.socket.send_str(wire.encode({"events": events}))
                await asyncio.sleep(FRAME_GAP)


class Server:
    """All of the worker but its engine. Everything runs on the event loop's thread except `_sink`
    and `_submit`.
    """

    def __init__(
        self, token: str, *, name: str = "", grace: float = GRACE, keep_ended: float = KEEP_ENDED
    ):
        self.token, self.name, self.grace, self.keep_ended = token, name, grace, keep_ended
        self.state = "loading"  # -> ready | failed | closing
        self.reason = ""
        self.fingerprint = ""
        self.engine: EngineLike | None = None
        self.boot = os.urandom(8).hex()  # another boot, another memory: no sequence survives
        self.ended = asyncio.Event()  # set when the worker should stop
        self.exit_code = EXIT_STOPPED
        self._loop = asyncio.get_running_loop()
        self._held: dict[str, Held] = {}
        self._ended_characters = 0
        self._clients: set[Client] = set()
        self._arrived: deque[Held] = deque()
        self._bell_rung = False
        self._stop_engine = threading.Event()
        self._engine_thread: threading.Thread | None = None
        # tokenising and adapter loading, in order
        self._door = ThreadPoolExecutor(1, thread_name_prefix="submit")
        self._housekeeping: asyncio.Task | None = None

    def application(self) -> web.Application:
        application = web.Application(
            middlewares=[self._authenticate], client_max_size=wire.LARGEST_FRAME
        )
        application.router.add_get("/status", self._get_status)
        application.router.add_get("/stream", self._stream)
        return application

    def begin(self) -> None:
        self._housekeeping = asyncio.create_task(self._keep_house())

    def ready(self, engine: EngineLike, fingerprint: str) -> None:
        """The model is loaded: take requests."""
        self.engine, self.fingerprint, self.state = engine, fingerprint, "ready"
        self._engine_thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)
        self._engine_thread.start()
        self._tell_status()

    def failed(self, reason: str) -> None:
        self.state, self.reason = "failed", reason
        self.end(EXIT_FAILED)

    def end(self, exit_code: int = EXIT_STOPPED) -> None:
        if not self.ended.is_set():
            self.exit_code = exit_code
            self.ended.set()

    async def drain(self, seconds: float) -> None:
        """Takes nothing more and waits for the running sequences."""
        self.state, self.reason = "closing", "the worker is about to serve another checkpoint"
        self._tell_status()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(
            not held.log.ended for held in self._held.values()
        ):
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        """Ends what runs (its readers are told), then the connections."""
        self.state = "closing"
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        for held in self._held.values():
            if not held.log.ended:
                held.cause = held.cause or "shutdown"
        if self._engine_thread is not None:
            self._stop_engine.set()
            await asyncio.to_thread(self._engine_thread.join)
            await asyncio.to_thread(self.engine.close)
        self._deliver()
        self._door.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                while any(
                    client.news or client.control or client.wake.is_set()
                    for client in self._clients
                ):
                    await asyncio.sleep(0.02)
        for client in list(self._clients):
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.socket.close(code=1001, message=b"closing"), 1.0)

    # -- the engine's side

    def _run_engine(self) -> None:
        try:
            self.engine.run_forever(self._stop_engine)
        except BaseException:
            log.exception("the engine's thread has died; ending the worker")
            self._loop.call_soon_threadsafe(self.failed, "the engine's thread has died")

    def _sink(self, held: Held, event: Event) -> None:
        """On the engine's thread."""
        if event.terminal and held.cause:
            event = replace(event, data={**event.data, "cause": held.cause})
        held.log.append(event)
        self._arrived.append(held)
        if not self._bell_rung:
            self._bell_rung = True
            # After the end of the loop there is nobody left to tell.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._bell_rung = False  # before looking: a later event rings again
        while self._arrived:
            held = self._arrived.popleft()
            for reader in held.readers:
                reader.client.notice(reader)
            if held.log.ended and held.ended_at is None:
                held.ended_at = time.monotonic()
                self._ended_characters += held.log.characters

    # -- the clients' side

    @web.middleware
    async def _authenticate(self, request: web.Request, handler):
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            return web.json_response(
                {"error": "the worker's token is missing or wrong"}, status=401
            )
        return await handler(request)

    async def _get_status(self, _request: web.Request) -> web.Response:
        return web.json_response(self.status())

    def status(self) -> dict[str, Any]:
        """The engine's figures, and who this worker is. state: loading | ready | failed |
        closing.
        """
        figures = (
            self.engine.status()
            if self.engine is not None and self.state in ("ready", "closing")
            else {}
        )
        return {
            **figures,
            "state": self.state,
            "reason": self.reason,
            "checkpoint": self.name,
            "fingerprint": self.fingerprint,
            "pid": os.getpid(),
            "boot": self.boot,
            "clients": len(self._clients),
            "sequences": sum(not held.log.ended for held in self._held.values()),
        }

    def _tell_status(self) -> None:
        status = self.status()
        for client in self._clients:
            client.tell({"status": status})

    async def _stream(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(
            compress=False, heartbeat=20.0, max_msg_size=wire.LARGEST_FRAME
        )
        try:
            await socket.prepare(request)
        except ConnectionError:  # the client has given up meanwhile
            return socket
        client = Client(socket)
        self._clients.add(client)
        client.tell({"status": self.status()})
        writer = asyncio.create_task(self._write(client))
        try:
            async for message in socket:
                if message.type is not WSMsgType.TEXT:
                    break
                if not self._handle(client, message.data):
                    await socket.close(code=1008, message=b"not understood")
                    break
        finally:
            self._clients.discard(client)
            writer.cancel()
            for reader in tuple(client.readers.values()):
                reader.leave()
        return socket

    async def _write(self, client: Client) -> None:
        try:
            await client.write()
        except ConnectionError:
            pass  # the reading side sees the end
        except Exception:
            log.exception("a client's writer failed")
            await client.socket.close(code=1011)

    def _handle(self, client: Client, text: str) -> bool:
        """One frame of a client; False when it is not in the protocol."""
        try:
            frame = json.loads(text)
            operation = frame["op"]
            if operation == "submit":
                self._accept(client, frame["call"], frame["request"])
            elif operation == "attach":
                self._attach(client, frame["reading"], frame["id"], int(frame.get("after", 0)))
            elif operation == "detach":
                if frame["reading"] in client.readers:
                    client.readers[frame["reading"]].leave()
            elif operation == "abort":
                self._abort(frame["id"])
            else:
                return False
        except (KeyError, TypeError, ValueError) as error:
            log.warning("a client sent a frame that is not understood: %r", error)
            return False
        return True

    def _accept(self, client: Client, call: int, fields: dict[str, Any]) -> None:
        """Starts a sequence with `client` as its reader. Sending the same id again only attaches: a
        lost reply can be repeated.
        """
        try:
            request = wire.request_from_dict(fields)
        except (KeyError, TypeError, ValueError) as error:
            client.tell(_reply(call, RequestRefused("invalid_value", f"not a request: {error}")))
            return
        if self.state != "ready":
            reason = f": {self.reason}" if self.reason else ""
            client.tell(
                _reply(
                    call,
                    RequestRefused("unavailable", f"the worker is {self.state}{reason}", None, 5),
                )
            )
            return
        if request.id in self._held:
            self._attach(client, call, request.id, 0)
            client.tell(_reply(call, None))
            return
        held = self._held[request.id] = Held(request.id)
        reader = Reader(client, call, held, 0)
        future = self._loop.run_in_executor(
            self._door, self.engine.submit, request, lambda e: self._sink(held, e)
        )
        future.add_done_callback(lambda done: self._accepted(client, call, reader, done))

    def _accepted(self, client: Client, call: int, reader: Reader, done: asyncio.Future) -> None:
        held, error = reader.held, None if done.cancelled() else done.exception()
        if error is not None:
            self._held.pop(held.log.id, None)
            for each in tuple(held.readers):
                each.leave()
            if not isinstance(error, RequestRefused):
                log.error("submitting %s failed", held.log.id, exc_info=error)
                error = RequestRefused(
                    "internal_error", f"the engine could not take the request: {error}"
                )
        client.tell(_reply(call, error))

    def _attach(self, client: Client, number: int, id: str, after: int) -> None:
        held = self._held.get(id)
        if held is None:
            client.tell({"unknown": number})
        else:
            client.notice(Reader(client, number, held, after))

    def _abort(self, id: str) -> None:
        # by the same door as submissions, or an abort could overtake the one that it means
        if id in self._held:
            self._door.submit(self.engine.abort, id)

    async def _keep_house(self) -> None:
        told: dict[str, Any] = {}
        while True:
            await asyncio.sleep(min(STATUS_INTERVAL, self.grace / 4))
            now = time.monotonic()
            for held in list(self._held.values()):
                unread = held.unread_since
                if unread is not None and not held.log.ended and now - unread > self.grace:
                    held.cause, held.unread_since = "no_reader", None
                    self._abort(held.log.id)
            self._forget(now)
            status = self.status()
            if status != told:
                told = status
                self._tell_status()

    def _forget(self, now: float) -> None:
        """Drops ended logs that are old, and the oldest ones when they hold too much text. `_held`
        is in order of submission.
        """
        for id, held in list(self._held.items()):
            if held.ended_at is None or held.readers:
                continue
            if now - held.ended_at > self.keep_ended or self._ended_characters > KEEP_CHARACTERS:
                del self._held[id]
                self._ended_characters -= held.log.characters


def _reply(call: int, error: RequestRefused | None) -> dict[str, Any]:
    if error is None:
        return {"call": call, "error": None}
    fields = {
        "code": error.code,
        "message": error.message,
        "param": error.param,
        "retry_after": error.retry_after,
    }
    return {"call": call, "error": fields}
