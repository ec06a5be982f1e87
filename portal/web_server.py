"""The web process: `python -m portal.web_server --host 127.0.0.1 --port 8000`.

daphne, with what a server owes to hostile clients. As it comes, it takes a whole body before the
application hears of the request, parses forms on the event loop, and holds bodies and answers in
memory. Here the application begins when the head is there; a body comes as it is asked for and an
answer goes as it is read, so nothing that a client sends or does not read piles up
(portal/request_bodies.py sets the limits).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import ipaddress
import resource
import sys
from functools import partial

from daphne import server as daphne_server  # first: it installs Twisted's asyncio reactor
from daphne.http_protocol import HTTPFactory, WebRequest
from twisted.internet import reactor
from twisted.internet.error import AlreadyCalled, AlreadyCancelled
from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

HEADERS_WITHIN = 20.0  # seconds for a request's head, from its first byte
# seconds in which the rest of a refused body is thrown away, so that its reason is read
LINGER = 3.0
LARGEST_FRAME = 2 * 1024 * 1024  # bytes of one websocket message
AHEAD = 256 * 1024  # bytes of a body, or of frames, that may wait for the application
FRAME = 1024  # bytes that a websocket's frame counts for, beside its own
BACKLOG = 1024  # a room that reconnects at once


class Received(asyncio.Queue):
    """What an application receives: the transport is paused while it has not caught up."""

    def __init__(self, transport):
        super().__init__()
        self._transport, self._ahead, self._paused = transport, 0, False

    def put_nowait(self, message) -> None:
        self._ahead += _size(message)
        super().put_nowait(message)
        if self._ahead > AHEAD and not self._paused:
            self._paused = True
            self._transport.pauseProducing()

    async def get(self):
        message = await super().get()
        self._ahead -= _size(message)
        if self._paused and self._ahead <= AHEAD // 2:
            self._paused = False
            self._transport.resumeProducing()
        return message


class Body(Received):
    open = False  # until then: daphne's own message, of a body that it would have read

    def put_nowait(self, message) -> None:
        if self.open:
            super().put_nowait(message)


def _size(message) -> int:
    if message["type"] == "websocket.receive":
        return FRAME + len(message.get("text") or message.get("bytes") or "")
    return len(message.get("body", b""))


@implementer(IPushProducer)
class Flow:
    """Tells when an answer may go on: the transport pauses it while the client does not read."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.free.set()

    def pauseProducing(self) -> None:
        self.free.clear()

    def resumeProducing(self) -> None:
        self.free.set()

    stopProducing = resumeProducing


class Request(WebRequest):
    """daphne's, whose application begins at the head where a body follows."""

    def __init__(self, *arguments, **options):
        # Twisted would parse a form on the event loop, before anybody looked at its size.
        super().__init__(*arguments, parsePOSTFormSubmission=False, **options)
        self.flow: Flow | None = None
        self._streamed = self._received = self._answered = False
        self._head = reactor.callLater(HEADERS_WITHIN, self._abandon)

    def gotLength(self, length):
        self._head.cancel()
        super().gotLength(length)
        if length == 0:
            return  # all of it is there: daphne's way, which knows websockets too
        self._streamed, self.content = True, io.BytesIO()
        self.method, self.uri = self.channel._command, self.channel._path
        self.clientproto = self.channel._version
        self.path = self.uri.partition(b"?")[0]
        self.process()
        if isinstance(self.application_queue, Body):
            self.application_queue.open = True

    def handleContentChunk(self, data):
        if self._streamed and not self._answered and self.application_queue is not None:
            message = {"type": "http.request", "body": data, "more_body": True}
            self.application_queue.put_nowait(message)

    def requestReceived(self, command, path, version):
        if not self._streamed:
            return super().requestReceived(command, path, version)
        self._received = True
        if self._answered:
            super().finish()
        elif self.application_queue is not None:
            end = {"type": "http.request", "body": b"", "more_body": False}
            self.application_queue.put_nowait(end)

    def handle_reply(self, message):
        if message["type"] == "http.response.start" and self.flow is None:
            self.flow = Flow()
            self.registerProducer(self.flow, True)
        super().handle_reply(message)

    def finish(self):
        """An answer that did not wait for the body keeps the line until that has come, or LINGER:
        a client that is still sending would not read it otherwise.
        """
        self._free()
        if self._streamed and not self._received and not self._answered:
            self._answered = True
            if isinstance(self.application_queue, Body):
                self.application_queue._transport.resumeProducing()
            reactor.callLater(LINGER, self._abandon)
        elif not self._answered:
            super().finish()

    def connectionLost(self, reason):
        with contextlib.suppress(AlreadyCalled, AlreadyCancelled):
            self._head.cancel()
        self._free()
        super().connectionLost(reason)

    def _free(self) -> None:
        if self.flow is not None and self.producer is self.flow:
            self.unregisterProducer()
            self.flow.resumeProducing()

    def _abandon(self) -> None:
        if self.channel is not None and not self.finished:
            self.channel.transport.abortConnection()


class Factory(HTTPFactory):
    def buildProtocol(self, addr):
        protocol = super().buildProtocol(addr)
        protocol.requestFactory = Request
        return protocol


class WebServer(daphne_server.Server):
    def create_application(self, protocol, scope):
        if "client" in scope:
            behind_proxy(scope)
        if scope["type"] == "websocket":
            received = Received(protocol.transport)
        elif protocol._streamed:
            received = Body(protocol.channel._networkProducer)
        else:
            return super().create_application(protocol, scope)
        scope.setdefault("asgi", {"version": "3.0"})
        application = self.application(
            scope=scope, receive=received.get, send=partial(self.handle_reply, protocol)
        )
        if protocol not in self.connections:
            return None
        self.connections[protocol]["application_instance"] = asyncio.ensure_future(application)
        return received

    async def handle_reply(self, protocol, message):
        await super().handle_reply(protocol, message)
        flow = getattr(protocol, "flow", None)
        if flow is not None:
            await flow.free.wait()


def behind_proxy(scope) -> None:
    """The client's own address and scheme, from the headers of a proxy that PORTAL_PROXIES names:
    the last address that is none of these. What stands before it the client may have written.
    """
    from django.conf import settings

    if not settings.HTTPS or not scope["client"] or not _is_proxy(scope["client"][0]):
        return
    headers = dict(scope["headers"])  # the last of a name
    hops = [
        hop.strip() for hop in headers.get(b"x-forwarded-for", b"").decode("latin-1").split(",")
    ]
    for hop in reversed(hops):
        if hop and not _is_proxy(hop):
            scope["client"] = [hop, 0]
            break
    proto = headers.get(b"x-forwarded-proto", b"").decode("latin-1").strip().lower()
    if proto in ("http", "https"):
        websocket = scope["type"] == "websocket"
        scope["scheme"] = proto.replace("http", "ws") if websocket else proto


def _is_proxy(address: str) -> bool:
    from django.conf import settings

    if "*" in settings.PROXIES:
        return True
    try:
        found = ipaddress.ip_address(address)
        return any(found in ipaddress.ip_network(each, strict=False) for each in settings.PROXIES)
    except ValueError:
        return address in settings.PROXIES


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The portal's web process alone; `manage.py up` starts it."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    _soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # a socket is a file; the usual 1,024 are few
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    from portal.asgi import application  # before the event loop runs: it looks into the database

    server = web_server(application, arguments.host, arguments.port)
    server.run()
    if server.abort_start or not server.listening_addresses:
        sys.exit(1)


def web_server(application, host: str, port: int) -> WebServer:
    daphne_server.HTTPFactory = Factory  # Server.run makes one, and takes no other
    interface = host.replace(":", r"\:")  # Twisted's endpoint syntax
    return WebServer(
        application,
        endpoints=[f"tcp:port={port}:interface={interface}:backlog={BACKLOG}"],
        application_close_timeout=5,
        websocket_max_message_size=LARGEST_FRAME,
        websocket_max_frame_size=LARGEST_FRAME,
        verbosity=0,
        server_name="",
    )


if __name__ == "__main__":
    main()
