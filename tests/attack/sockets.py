"""Websockets: frames that are wrong, frames that are none, and too many."""

import contextlib
import json
import os
import socket
import struct
import threading
import time
from random import Random

from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import connect

from tests.attack import values
from tests.attack.client import head

ENDED = (ConnectionClosed, InvalidStatus, InvalidMessage, OSError)


class Sockets:
    """`sent`: frames; `lost`: sockets that ended without a close code, `told` says after what."""

    def __init__(self, portal, people: dict, chance: Random):
        self.port, self.chance = portal.port, chance
        self.key = f"Bearer {people['mallory']['key']}"
        self.path = f"/ws/conversations/{people['rows']['conversation']}/"
        self.messages = [people["rows"]["message"], 1, 99_999, 2**70]
        self.sent, self.lost, self.told = 0, 0, []

    def _open(self):
        return connect(
            f"ws://127.0.0.1:{self.port}{self.path}",
            additional_headers={"Authorization": self.key}, max_size=None, close_timeout=10,
        )  # fmt: skip

    def frames(self, count: int) -> None:
        """Each answered, or the socket ended with a code that says why."""
        page = self._open()
        try:
            for _frame in range(count):
                said = values.frame(self.chance, self.messages)
                try:
                    page.send(said)
                    self.sent += 1
                    with contextlib.suppress(TimeoutError):
                        while True:
                            page.recv(0.02)
                except ConnectionClosed as end:
                    if end.rcvd is None:
                        self.lost += 1
                        self.told.append(f"{said[:200]!r} ({len(said)})")
                    page = self._open()
        finally:
            page.close()

    def nonsense(self, count: int) -> None:
        """Bytes that are no frames behind a good handshake; and handshakes that are none."""
        for number in range(count):
            key = "dGhlIHNhbXBsZSBub25jZQ==" if number % 4 else self.chance.choice(values.TEXTS[:9])
            asked = [
                f"Authorization: {self.key}", "Upgrade: websocket", "Connection: Upgrade",
                f"Sec-WebSocket-Key: {key}".encode("utf-8", "replace").decode("latin-1"),
                f"Sec-WebSocket-Version: {self.chance.choice(('13', '13', '8', '99', 'x'))}",
            ]  # fmt: skip
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), timeout=30) as line,
            ):
                line.sendall(head("GET", self.path, *asked, port=self.port))
                line.recv(4096)
                line.sendall(self._no_frame())
                line.settimeout(1)
                while line.recv(65536):
                    pass

    def _no_frame(self) -> bytes:
        mask = os.urandom(4)
        return self.chance.choice(
            [
                self.chance.randbytes(200),
                b"\x81\x7f" + struct.pack(">Q", 2**62),  # a text without mask, of 4 EB
                b"\x81\xff" + struct.pack(">Q", 2**63 - 1) + mask,
                b"\x01\x81" + mask + b"x" + b"\x01\x81" + mask + b"x",  # begins twice
                b"\x80\x81" + mask + b"x",  # goes on with nothing
                b"\x89\xfe\x10\x00" + mask + b"x" * 4096,  # a long ping
                b"\x88\x81" + mask + b"x",  # a close of one byte
                b"\x81\x84" + mask + b"\xff\xff\xff\xff",  # is no UTF-8
                b"\xf1\x80" + mask,
                b"\x01\x80" + mask + b"\x00\x80" * 0 + (b"\x00\x80" + mask) * 20_000,
            ]
        )

    def flood(self, count: int, seconds: float) -> None:
        """As many frames as go out, from `count` sockets; one that is closed is opened again."""
        ends = time.monotonic() + seconds
        frame = json.dumps({"type": "attach", "message": 99_999_999})

        def flooding() -> None:
            while time.monotonic() < ends:
                with contextlib.suppress(*ENDED), self._open() as page:
                    while time.monotonic() < ends:
                        page.send(frame)
                        self.sent += 1

        threads = [threading.Thread(target=flooding) for _socket in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
