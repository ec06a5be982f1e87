"""The worker's process: binds its socket, loads its checkpoint, serves until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat

from aiohttp import web

from chat.worker.server import GRACE, KEEP_ENDED, LOADING_WAIT, Server
from chat.worker.serving import Supply
from chat.worker.wire import Address


class AlreadyServed(Exception):
    """Another process listens on this address."""


def bind(address: Address) -> socket.socket:
    """A listening socket; of a unix address only the owner can use it. Raises AlreadyServed.

    A socket file that a killed worker left behind is replaced; one that answers is not.
    """
    if not address.path:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((address.host, address.port))
        except OSError as error:
            listening.close()
            raise AlreadyServed(f"cannot listen on {address}: {error.strerror}") from error
        listening.listen(128)
        return listening
    path = address.short_path()
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise AlreadyServed(f"{address.path} exists and is not a socket")
        try:
            address.connect(1.0).close()
        except ConnectionRefusedError:
            os.unlink(path)
        else:
            raise AlreadyServed(f"another worker listens on {address}")
    listening = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        listening.bind(path)
    finally:
        os.umask(mask)
    listening.listen(128)
    return listening


async def serve(
    listening: socket.socket,
    token: str,
    supply: Supply,
    *,
    grace: float = GRACE,
    keep_ended: float = KEEP_ENDED,
    loading_wait: float = LOADING_WAIT,
    idle_after: float = 0.0,
) -> int:
    """Serves until SIGTERM, SIGINT or a fault, or until `supply` has nothing more to be served;
    returns the process's exit code.
    """
    server = Server(
        token,
        supply,
        grace=grace,
        keep_ended=keep_ended,
        loading_wait=loading_wait,
        idle_after=idle_after,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.end)
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.SockSite(runner, listening).start()
    server.begin()
    try:
        await server.ended.wait()
    finally:
        await server.close()
        await runner.cleanup()
    return server.exit_code
