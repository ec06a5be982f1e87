"""The worker's server: lets many clients submit, follow and abort sequences of one engine. The
protocol is in wire.py.

The socket is bound before the model is loaded, so that whoever asks is told "loading" instead of
finding nobody. The engine's thread only appends to logs and rings a doorbell; it never waits
for a reader. Each client's frames are made when that client can take them, from the logs, so a slow
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
from dataclasses import replace
from typing import Any, Protocol

from aiohttp import WSMsgType, web
from aiohttp.typedefs import Handler

from chat.engine.request import Event, Request, RequestRefused, Sink
from chat.worker import wire
from chat.worker.event_log import Doorbell
from chat.worker.submissions import Submissions
from chat.worker.subscriptions import Client, SequenceState, Subscription

log = logging.getLogger(__name__)

GRACE = 30.0  # seconds that a sequence goes on without a reader
KEEP_ENDED = 300.0  # seconds that an ended log can still be read
KEEP_CHARACTERS = 64_000_000  # of text in ended logs; the oldest go first
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
        self._sequences: dict[str, SequenceState] = {}
        self._ended_characters = 0
        self._clients: set[Client] = set()
        self._doorbell: Doorbell[SequenceState] = Doorbell(self._tell_readers)
        self._stop_engine = threading.Event()
        self._engine_thread: threading.Thread | None = None
        self._submissions = Submissions()
        self._supervision: asyncio.Task[None] | None = None

    def application(self) -> web.Application:
        application = web.Application(
            middlewares=[self._authenticate], client_max_size=wire.LARGEST_FRAME
        )
        application.router.add_get("/status", self._get_status)
        application.router.add_get("/stream", self._stream)
        return application

    def begin(self) -> None:
        self._supervision = asyncio.create_task(self._supervise())

    def ready(self, engine: EngineLike, fingerprint: str) -> None:
        """The model is loaded: take requests."""
        self.engine, self.fingerprint, self.state = engine, fingerprint, "ready"
        self._engine_thread = threading.Thread(
            target=self._run_engine, args=(engine,), name="engine", daemon=True
        )
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
            not sequence.ended for sequence in self._sequences.values()
        ):
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        """Ends what runs (its readers are told), then the connections."""
        self.state = "closing"
        if self._supervision is not None:
            self._supervision.cancel()
        for sequence in self._sequences.values():
            if not sequence.ended:
                sequence.cause = sequence.cause or "shutdown"
        if self.engine is not None and self._engine_thread is not None:
            self._stop_engine.set()
            await asyncio.to_thread(self._engine_thread.join)
            await asyncio.to_thread(self.engine.close)
        self._doorbell.look()
        self._submissions.shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                while any(
                    client.pending or client.control or client.wake.is_set()
                    for client in self._clients
                ):
                    await asyncio.sleep(0.02)
        for client in list(self._clients):
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.socket.close(code=1001, message=b"closing"), 1.0)

    # -- the engine's side

    def _run_engine(self, engine: EngineLike) -> None:
        try:
            engine.run_forever(self._stop_engine)
        except BaseException:
            log.exception("the engine's thread has died; ending the worker")
            self._loop.call_soon_threadsafe(self.failed, "the engine's thread has died")

    def _sink(self, sequence: SequenceState, event: Event) -> None:
        """On the engine's thread."""
        if event.terminal and sequence.cause:
            event = replace(event, data={**event.data, "cause": sequence.cause})
        sequence.append(event)
        self._doorbell.ring(sequence)

    def _tell_readers(self, sequence: SequenceState) -> None:
        sequence.notify()
        if sequence.ended and sequence.ended_at is None:
            sequence.ended_at = time.monotonic()
            self._ended_characters += sequence.characters

    # -- the clients' side

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
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
            "sequences": sum(not sequence.ended for sequence in self._sequences.values()),
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
            for subscription in tuple(client.subscriptions.values()):
                subscription.leave()
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
                if frame["reading"] in client.subscriptions:
                    client.subscriptions[frame["reading"]].leave()
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
        if self.engine is None or self.state != "ready":
            reason = f": {self.reason}" if self.reason else ""
            client.tell(
                _reply(
                    call,
                    RequestRefused("unavailable", f"the worker is {self.state}{reason}", None, 5),
                )
            )
            return
        if request.id in self._sequences:
            self._attach(client, call, request.id, 0)
            client.tell(_reply(call, None))
            return
        sequence = self._sequences[request.id] = SequenceState(request.id, request.user)
        subscription = Subscription(client, call, sequence, 0)
        future = asyncio.wrap_future(
            self._submissions.submit(
                request.user, self.engine.submit, request, lambda e: self._sink(sequence, e)
            )
        )
        future.add_done_callback(lambda done: self._accepted(client, call, subscription, done))

    def _accepted(
        self, client: Client, call: int, subscription: Subscription, done: asyncio.Future[None]
    ) -> None:
        sequence, error = subscription.sequence, None if done.cancelled() else done.exception()
        if error is not None:
            self._sequences.pop(sequence.id, None)
            for each in self._subscriptions_to(sequence):
                each.leave()
            if not isinstance(error, RequestRefused):
                log.error("submitting %s failed", sequence.id, exc_info=error)
                error = RequestRefused(
                    "internal_error", f"the engine could not take the request: {error}"
                )
        client.tell(_reply(call, error))

    def _subscriptions_to(self, sequence: SequenceState) -> list[Subscription]:
        everyone = (each for client in self._clients for each in client.subscriptions.values())
        return [each for each in everyone if each.sequence is sequence]

    def _attach(self, client: Client, number: int, id: str, after: int) -> None:
        sequence = self._sequences.get(id)
        if sequence is None:
            client.tell({"unknown": number})
        else:
            client.notice(Subscription(client, number, sequence, after))

    def _abort(self, id: str) -> None:
        # in order with submissions, or an abort could overtake the one that it means
        if self.engine is not None and id in self._sequences:
            self._submissions.submit(self._sequences[id].user, self.engine.abort, id)

    async def _supervise(self) -> None:
        told: dict[str, Any] = {}
        while True:
            await asyncio.sleep(min(STATUS_INTERVAL, self.grace / 4))
            now = time.monotonic()
            for sequence in list(self._sequences.values()):
                unread = sequence.unread_since
                if unread is not None and not sequence.ended and now - unread > self.grace:
                    sequence.cause, sequence.unread_since = "no_reader", None
                    self._abort(sequence.id)
            self._forget(now)
            status = self.status()
            if status != told:
                told = status
                self._tell_status()

    def _forget(self, now: float) -> None:
        """Drops ended logs that are old, and the oldest ones when they hold too much text. `_held`
        is in order of submission.
        """
        for id, sequence in list(self._sequences.items()):
            if sequence.ended_at is None or sequence.followers:
                continue
            if (
                now - sequence.ended_at > self.keep_ended
                or self._ended_characters > KEEP_CHARACTERS
            ):
                del self._sequences[id]
                self._ended_characters -= sequence.characters


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
