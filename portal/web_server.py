"""The web process: `python -m portal.web_server --host 127.0.0.1 --port 8000`.

uvicorn, with what a server owes to hostile clients. Bodies are read as the application asks for
them; frames and answers wait for the other side. So nothing that a client sends or does not read
piles up in memory (docs/adr/0004-uvicorn.md).
"""

import argparse
import resource
import sys

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_WITHIN = 20.0  # seconds for a request's head, from the connection's start
LINGER = (
    3.0  # seconds in which the rest of a refused body is thrown away, so that its reason is read
)
LARGEST_FRAME = 2 * 1024 * 1024  # bytes of one websocket message
BACKLOG = 1024  # a room that reconnects at once


class Protocol(H11Protocol):
    """uvicorn's, which waits for ever for a request's head and for an unwanted body's end."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.patience = None
        self._watch_head()

    def data_received(self, data):
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self._forget_head()

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self.patience is None and self.timeout_keep_alive_task is None:
            self.patience = self.loop.call_later(HEADERS_WITHIN, self.transport.close)

    def _forget_head(self) -> None:
        if self.patience is not None:
            self.patience.cancel()
            self.patience = None

    def on_response_complete(self):
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self.loop.call_later(LINGER, self._end_unread, self.cycle)

    def _end_unread(self, cycle) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self.transport.close()


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

    server = uvicorn.Server(configuration(application, arguments.host, arguments.port))
    server.run()
    if not server.started:
        sys.exit(1)


def configuration(application, host: str, port: int) -> uvicorn.Config:
    from django.conf import settings

    return uvicorn.Config(
        application,
        host=host,
        port=port,
        http=Protocol,
        ws="websockets-sansio",
        ws_max_size=LARGEST_FRAME,
        ws_per_message_deflate=False,  # tokens are too short to gain by it
        lifespan="off",
        backlog=BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=settings.HTTPS,
        forwarded_allow_ips=settings.PROXIES,
        timeout_graceful_shutdown=5,
    )


if __name__ == "__main__":
    main()
