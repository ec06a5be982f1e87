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
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from aiohttp import WSMsgType, web
from aiohttp.typedefs import Handler

from chat.engine.request import Event, Request, RequestRefused
from chat.worker import wire
from chat.worker.event_log import Doorbell
from chat.worker.held import Held, Waiting
from chat.worker.serving import DRAIN, Running, Serving, Supply, Target
from chat.worker.submissions import Submissions
from chat.worker.subscriptions import Client, SequenceState, Subscription

log = logging.getLogger(__name__)

GRACE = 30.0  # seconds that a sequence goes on without a reader
KEEP_ENDED = 300.0  # seconds that an ended log can still be read
KEEP_CHARACTERS = 64_000_000  # of text in ended logs; the oldest go first
STATUS_INTERVAL = 1.0
LOADING_WAIT = 300.0  # seconds that a sequence waits for its checkpoint

# Exit codes of the worker's process; the supervisor starts it again after each.
EXIT_STOPPED, EXIT_FAILED, EXIT_REPLACED = 0, 1, 3


class Server:
    """All of the worker but its engine. Everything runs on the event loop's thread except `_sink`
    and `_submit`.
    """

    def __init__(
        self,
        token: str,
        supply: Supply,
        *,
        grace: float = GRACE,
        keep_ended: float = KEEP_ENDED,
        loading_wait: float = LOADING_WAIT,
        idle_after: float = 0.0,
    ):
        """idle_after: seconds without a request after which the checkpoint leaves memory; 0: it
        stays.
        """
        self.token, self.grace, self.keep_ended = token, grace, keep_ended
        self.idle_after = idle_after
        self.reason = ""
        self.boot = os.urandom(8).hex()  # another boot, another memory: no sequence survives
        self.ended = asyncio.Event()  # set when the worker should stop
        self.exit_code = EXIT_STOPPED
        self.serving = Serving(supply, self)
        self._closing = ""  # why nothing is taken any more
        self._sequences: dict[str, SequenceState] = {}
        self._ended_characters = 0
        self._busy_at = time.monotonic()  # when there last was something to do
        self._clients: set[Client] = set()
        self._doorbell: Doorbell[SequenceState] = Doorbell(self._tell_readers)
        self._waiting = Waiting(loading_wait, self._tell_readers)
        self._submissions = Submissions()
        self._tasks: set[asyncio.Task[None]] = set()

    def application(self) -> web.Application:
        application = web.Application(
            middlewares=[self._authenticate], client_max_size=wire.LARGEST_FRAME
        )
        application.router.add_get("/status", self._get_status)
        application.router.add_get("/stream", self._stream)
        return application

    def begin(self) -> None:
        self._keep(self._supervise())
        self._keep(self._follow())

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self) -> None:
        if await self.serving.follow():
            log.warning("the checkpoint is no longer registered; ending after the running answers")
            await self.drain(DRAIN)
            self.end(EXIT_REPLACED)

    def end(self, exit_code: int = EXIT_STOPPED) -> None:
        if not self.ended.is_set():
            self.exit_code = exit_code
            self.ended.set()

    async def drain(self, seconds: float) -> None:
        """Takes nothing more and waits for the running sequences."""
        self._closing = "the worker is about to end"
        self._tell_status()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(
            not sequence.ended for sequence in self._sequences.values()
        ):
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        """Ends what runs (its readers are told), then the connections."""
        self._closing = self._closing or "the worker ends"
        for task in self._tasks:
            task.cancel()
        for sequence in self._sequences.values():
            if not sequence.ended:
                sequence.cause = sequence.cause or "shutdown"
        self._waiting.abort_all()
        await self.serving.close()
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

    # -- what Serving needs

    def tell_change(self) -> None:
        for held in self._waiting.take(self.serving.takes):
            self._hand_over(held)
        for held in self._waiting.take(lambda wanted: not self.serving.is_due(wanted)):
            self._waiting.fail(
                held, "no_worker_for_checkpoint", "another checkpoint is served instead"
            )
        self._waiting.tell(self.serving.coming)
        self._tell_status()

    def is_busy(self, running: Running) -> bool:
        return any(each.running is running for each in self._sequences.values() if not each.ended)

    def blame(self, running: Running, cause: str) -> None:
        for sequence in self._sequences.values():
            if sequence.running is running and not sequence.ended:
                sequence.cause = sequence.cause or cause

    def refuse_waiting(self, target: Target, error: Exception) -> None:
        for held in self._waiting.take(
            lambda wanted: wanted == target.fingerprint and not self.serving.takes(wanted)
        ):
            message = f"the model {target.name} could not be loaded: {error}"
            self._waiting.fail(held, "loading_failed", message)

    def give_up(self, reason: str) -> None:
        self.reason = reason
        self.end(EXIT_FAILED)

    # -- the engine's side

    def _sink(self, sequence: SequenceState, event: Event) -> None:
        """On the engine's thread."""
        if event.terminal and sequence.cause:
            event = replace(event, data={**event.data, "cause": sequence.cause})
        if sequence.notices:
            event = replace(event, seq=event.seq + sequence.notices)
        sequence.append(event)
        self._doorbell.ring(sequence)

    def _tell_readers(self, sequence: SequenceState) -> None:
        sequence.notify()
        if sequence.ended and sequence.ended_at is None:
            sequence.ended_at = self._busy_at = time.monotonic()
            sequence.running = None  # an engine is not kept in memory by what is read later
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

    @property
    def state(self) -> str:
        """loading | ready | resting (out of memory until somebody asks) | failed | closing."""
        if self.ended.is_set() and self.exit_code == EXIT_FAILED:
            return "failed"
        if self._closing:
            return "closing"
        serving = self.serving
        if serving.current is not None and serving.current.accepting:
            return "ready"
        return "resting" if serving.resting is not None and serving.coming is None else "loading"

    def status(self) -> dict[str, Any]:
        """The engine's figures, and who this worker is. coming: what is being loaded, perhaps
        beside what is served.
        """
        serving = self.serving
        running, coming = serving.current, serving.coming
        figures = running.engine.status() if running is not None else {}
        target = running.target if running is not None else serving.resting
        shown = target or (coming and coming.target)
        return {
            **figures,
            "state": self.state,
            "reason": self.reason or self._closing,
            "checkpoint": shown.name if shown else "",
            "fingerprint": target.fingerprint if target else "",
            "coming": coming and {"fingerprint": coming.target.fingerprint, **coming.told()},
            "pid": os.getpid(),
            "boot": self.boot,
            "clients": len(self._clients),
            "sequences": sum(not sequence.ended for sequence in self._sequences.values()),
            "waiting_for_model": len(self._waiting),
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
                fingerprint = str(frame.get("fingerprint") or "")
                self._accept(client, frame["call"], frame["request"], fingerprint)
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

    def _accept(self, client: Client, call: int, fields: dict[str, Any], fingerprint: str) -> None:
        """Starts a sequence with `client` as its reader. Sending the same id again only attaches: a
        lost reply can be repeated.
        """
        try:
            request = wire.request_from_dict(fields)
        except (KeyError, TypeError, ValueError) as error:
            client.tell(_reply(call, RequestRefused("invalid_value", f"not a request: {error}")))
            return
        if self._closing or self.ended.is_set():
            refusal = RequestRefused("unavailable", f"the worker is {self.state}", None, 5)
            client.tell(_reply(call, refusal))
            return
        if request.id in self._sequences:
            self._attach(client, call, request.id, 0)
            client.tell(_reply(call, None))
            return
        self._busy_at = time.monotonic()
        if self.serving.takes(fingerprint):
            self._begin(client, call, request)
        else:
            self._keep(self._hold(client, call, request, fingerprint))

    async def _hold(self, client: Client, call: int, request: Request, fingerprint: str) -> None:
        """Until its checkpoint is there; refused when nobody is going to load it."""
        if not fingerprint:
            fingerprint = self._awaited()
        if not fingerprint or not await self.serving.look(fingerprint):
            refusal = RequestRefused(
                "unavailable" if self.serving.current is None else "no_worker_for_checkpoint",
                f"the worker is {self.state} and serves {self.status()['checkpoint'] or 'nothing'}",
                None,
                5,
            )
            client.tell(_reply(call, refusal))
        elif self.serving.takes(fingerprint):  # meanwhile
            self._begin(client, call, request)
        elif request.id not in self._sequences:
            sequence = self._sequences[request.id] = SequenceState(request.id, request.user)
            Subscription(client, call, sequence, 0)
            self._waiting.add(sequence, request, fingerprint)
            client.tell(_reply(call, None))
            self._waiting.tell(self.serving.coming)

    def _awaited(self) -> str:
        """What a request gets that names no checkpoint."""
        coming = self.serving.coming
        target = coming.target if coming is not None else self.serving.resting
        return target.fingerprint if target is not None else ""

    def _begin(self, client: Client, call: int, request: Request) -> None:
        sequence = self._sequences[request.id] = SequenceState(request.id, request.user)
        subscription = Subscription(client, call, sequence, 0)
        self._submit(sequence, request).add_done_callback(
            lambda done: self._accepted(client, call, subscription, done)
        )

    def _submit(self, sequence: SequenceState, request: Request) -> asyncio.Future[None]:
        running = self.serving.current
        assert running is not None
        sequence.running = running
        return asyncio.wrap_future(
            self._submissions.submit(
                request.user, running.engine.submit, request, lambda e: self._sink(sequence, e)
            )
        )

    def _hand_over(self, held: Held) -> None:
        """What was held to the engine; its submitter has been told long ago that it was taken."""

        def refused(done: asyncio.Future[None]) -> None:
            error = None if done.cancelled() else done.exception()
            if error is not None:
                self._append_failure(held.sequence, _as_refusal(held.sequence.id, error))

        self._submit(held.sequence, held.request).add_done_callback(refused)

    def _append_failure(self, sequence: SequenceState, error: RequestRefused) -> None:
        data = {"error": error.as_error()}
        sequence.append(Event(sequence.id, sequence.last + 1, "failed", data))
        self._tell_readers(sequence)

    def _accepted(
        self, client: Client, call: int, subscription: Subscription, done: asyncio.Future[None]
    ) -> None:
        sequence, error = subscription.sequence, None if done.cancelled() else done.exception()
        if error is not None:
            self._sequences.pop(sequence.id, None)
            for each in self._subscriptions_to(sequence):
                each.leave()
            error = _as_refusal(sequence.id, error)
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
        sequence = self._sequences.get(id)
        if sequence is None or self._waiting.abort(id):
            return
        if sequence.running is not None:
            self._submissions.submit(sequence.user, sequence.running.engine.abort, id)

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
            self._waiting.tell(self.serving.coming)
            await self._rest_if_idle(now)
            status = self.status()
            if status != told:
                told = status
                self._tell_status()

    async def _rest_if_idle(self, now: float) -> None:
        busy = any(not sequence.ended for sequence in self._sequences.values())
        if busy or self.serving.coming is not None or self.serving.current is None:
            self._busy_at = now
        elif self.idle_after and now - self._busy_at > self.idle_after:
            await self.serving.rest()

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


def _as_refusal(id: str, error: BaseException) -> RequestRefused:
    if isinstance(error, RequestRefused):
        return error
    log.error("submitting %s failed", id, exc_info=error)
    return RequestRefused("internal_error", f"the engine could not take the request: {error}")


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
