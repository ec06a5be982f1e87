"""The worker's process: binds its socket, loads its checkpoint, serves until it is told to stop or
replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable

from aiohttp import web

from chat.worker.server import EXIT_REPLACED, GRACE, KEEP_ENDED, EngineLike, Server
from chat.worker.wire import Address

log = logging.getLogger(__name__)

# seconds that running answers get when the worker must make way for another checkpoint
DRAIN = 60.0


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


# -> the engine and its checkpoint's fingerprint; slow, runs on a thread
Load = Callable[[], tuple[EngineLike, str]]


async def serve(
    listening: socket.socket,
    token: str,
    load: Load,
    *,
    name: str = "",
    replaced: Callable[[], str] | None = None,
    grace: float = GRACE,
    keep_ended: float = KEEP_ENDED,
) -> int:
    """Serves until SIGTERM, SIGINT or a fault; returns the process's exit code.

    replaced() is asked every few seconds, on a thread; when it gives a reason, the worker finishes
    its answers and ends.
    """
    server = Server(token, name=name, grace=grace, keep_ended=keep_ended)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.end)
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.SockSite(runner, listening).start()
    server.begin()
    threading.Thread(target=_load, args=(loop, server, load), name="load", daemon=True).start()
    watch = asyncio.create_task(_watch(server, replaced)) if replaced else None
    try:
        await server.ended.wait()
    finally:
        if watch is not None:
            watch.cancel()
        await server.close()
        await runner.cleanup()
    return server.exit_code


def _load(loop: asyncio.AbstractEventLoop, server: Server, load: Load) -> None:
    """On a thread: the server answers "loading" meanwhile."""
    started = time.monotonic()
    try:
        engine, fingerprint = load()
    except Exception as error:
        log.exception("the checkpoint %s cannot be loaded", server.name)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(server.failed, str(error))
        return
    log.info("checkpoint %s is ready after %.1f s", server.name, time.monotonic() - started)
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(server.ready, engine, fingerprint)


async def _watch(server: Server, replaced: Callable[[], str], interval: float = 3.0) -> None:
    while True:
        await asyncio.sleep(interval)
        try:
            reason = await asyncio.to_thread(replaced)
        except Exception:
            log.exception("cannot tell whether the served checkpoint is still the right one")
            continue
        if reason:
            log.warning("%s; ending after the running answers", reason)
            await server.drain(DRAIN)
            server.end(EXIT_REPLACED)
            return
