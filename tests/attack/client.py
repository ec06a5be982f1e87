"""Raw requests, as no well-behaved client sends them."""

import contextlib
import socket
import threading
import time
import urllib.request
from collections.abc import Iterable

CHUNK = 1 << 16


def head(method: str, path: str, *headers: str, port: int = 0) -> bytes:
    named = any(field.lower().startswith("host:") for field in headers)
    lines = [f"{method} {path} HTTP/1.1", *([] if named else [f"Host: 127.0.0.1:{port}"]), *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def chunked(pieces: Iterable[bytes]) -> Iterable[bytes]:
    for piece in pieces:
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def send(
    port: int, start: bytes, pieces: Iterable[bytes] = (), *, seconds: float = 30
) -> tuple[int | None, bytes, int]:
    """(status, answer, bytes of the body that the server took). Status None: the connection was
    closed without an answer; TimeoutError: neither within `seconds`."""
    taken = 0
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(start)
            for piece in pieces:
                connection.sendall(piece)
                taken += len(piece)
                if _readable(connection):
                    break
            connection.settimeout(seconds)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(CHUNK):
                answer += data
                if _whole(answer):
                    break
    words = answer.split(b" ", 2)
    status = int(words[1]) if answer.startswith(b"HTTP/1.1 ") and words[1].isdigit() else None
    return status, answer, taken


def _readable(connection) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        connection.setblocking(True)


def _whole(answer: bytes) -> bool:
    """Has everything come that the head announces?"""
    top, found, body = answer.partition(b"\r\n\r\n")
    if not found:
        return False
    fields = dict(line.lower().split(b": ", 1) for line in top.split(b"\r\n")[1:] if b": " in line)
    if b"transfer-encoding" in fields:
        return body.endswith(b"0\r\n\r\n")
    return len(body) >= int(fields.get(b"content-length", 0))


class Neighbour:
    """Another user, who asks for one small page again and again.

    `with Neighbour(url) as other: ...`, then `other.longest` (seconds), `.answers` and `.errors`.
    """

    def __init__(
        self, url: str, headers: dict | None = None, pause: float = 0.02, body: bytes | None = None
    ):
        self.request = urllib.request.Request(url, body, headers or {})
        self.pause, self.longest, self.answers, self.errors = pause, 0.0, 0, []
        self.ended = threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self._ask, daemon=True)
        self.thread.start()
        while not self.answers and not self.errors:
            time.sleep(0.01)
        self.longest = 0.0
        return self

    def __exit__(self, *fault):
        self.ended.set()
        self.thread.join(60)

    def _ask(self) -> None:
        while not self.ended.is_set():
            begun = time.monotonic()
            try:
                with urllib.request.urlopen(self.request, timeout=60) as answer:
                    answer.read()
                self.answers += 1
            except OSError as error:
                self.errors.append(error)
            self.longest = max(self.longest, time.monotonic() - begun)
            self.ended.wait(self.pause)
