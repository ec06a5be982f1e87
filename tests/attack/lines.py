"""Connections that are no HTTP, or hardly: broken, slow, many, and such as do not read."""

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

from tests.attack.client import head, send


class Lines:
    def __init__(self, port: int, chance: Random, member: list[str]):
        self.port, self.chance, self.member = port, chance, member

    def nonsense(self, count: int) -> list[str]:
        """Sends what is no HTTP; those that were neither answered nor ended."""
        good = head("POST", "/healthz", "Content-Length: 2", port=self.port) + b"{}"
        spoken = [
            b"\0" * 100, b"\x16\x03\x01\x02\0\x01\0", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\nHost: x\n\n", b"\r\n" * 1000,
            b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET http://x/healthz HTTP/1.1\r\nHost: y\r\n\r\n", b"* / HTTP/1.1\r\nHost: x\r\n\r\n",
            good.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked") + b"zz\r\n",
            good.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked")[:-2] + b"-1\r\n",
            good.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked")[:-2]
            + b"f" * 40 + b"\r\n",
            good.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked")[:-2]
            + b"2;" + b"x" * 50_000 + b"\r\n{}\r\n0\r\n\r\n",
            good * 50,  # one after another, unasked
        ]  # fmt: skip
        said = []
        for _line in range(count):
            start = bytearray(self.chance.choice([*spoken, good]))
            for _byte in range(self.chance.choice((0, 1, 5))):
                start[self.chance.randrange(len(start))] = self.chance.randrange(256)
            said.append(bytes(start) + b"\r\n\r\n")
        with ThreadPoolExecutor(count) as hands:
            return [told for told in hands.map(self._unanswered, said) if told]

    def _unanswered(self, said: bytes) -> str | None:
        try:  # the head's time is 20 s, a body's 60
            send(self.port, said, seconds=90)
        except TimeoutError:
            return f"no HTTP: {said[:200]!r}"
        except OSError:
            pass
        return None

    def slow(self, count: int, seconds: float) -> None:
        """Heads and bodies that come byte by byte."""
        half = head("GET", "/healthz", port=self.port)[:-2]
        body = head("POST", "/v1/chat/completions", *self.member, "Content-Length: 100000",
                    "Content-Type: application/json", port=self.port)  # fmt: skip
        with contextlib.ExitStack() as lines:
            opened = []
            for number in range(count):
                line = lines.enter_context(socket.create_connection(("127.0.0.1", self.port)))
                line.sendall(body if number % 2 else half)
                opened.append(line)
            ends = time.monotonic() + seconds
            while time.monotonic() < ends:
                for number, line in enumerate(opened):
                    with contextlib.suppress(OSError):
                        line.sendall(b"x" if number % 2 else b"X: 1\r\n")
                time.sleep(1)

    def unread(self, count: int, seconds: float) -> None:
        """Asks for what is long, and reads nothing of it."""
        paths = ["/api/schema/", "/static/portal/chat.js", "/api/v1/adapters/1/download/",
                 "/api/v1/datasets/1/examples/?page_size=500", "/api/docs/"]  # fmt: skip
        with contextlib.ExitStack() as lines:
            for number in range(count):
                line = socket.socket()
                line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                lines.enter_context(line).connect(("127.0.0.1", self.port))
                asked = head("GET", paths[number % len(paths)], *self.member, port=self.port)
                with contextlib.suppress(OSError):
                    line.sendall(asked * 3)
            time.sleep(seconds)
