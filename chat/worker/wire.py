"""How worker and clients talk: addresses, and the frames on their one websocket. No torch, no
Django.

A client keeps one websocket to `/stream`; it carries every sequence of that client. Frames are JSON
texts.

client -> worker   {"op": "submit", "call": n, "request": {...}}
                   answered; n also is a reading of the new sequence
                   {"op": "attach", "reading": n, "id", "after": N}
                   events from N + 1 on, or {"unknown": n}
                   {"op": "detach", "reading": n}    {"op": "abort", "id"}
worker -> client   {"status": {...}}
                   first frame, and whenever something in it changed
                   {"call": n, "error": null | {"code", "message", "param", "retry_after"}}
                   {"events": [[reading, seq, type, data], ...]}
                   everything new since the last frame, in order per reading
                   {"unknown": n}

A client numbers its calls and readings in one row and uses no number twice on a connection, so that
what is still under way for a reading that was given up is never taken for another's.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from chat.engine.request import AdapterRef, Request, SamplingParams

LARGEST_FRAME = 32 * 1024 * 1024  # bytes; a prompt of a full 128k context fits many times
LONGEST_SOCKET_PATH = 100  # sun_path has 108 bytes
TURN = ("role", "content", "tool_calls", "tool_call_id", "name")  # of a message


@dataclass(frozen=True)
class Address:
    """`unix:/path.sock` or `http://host:port`."""

    path: str = ""  # of a unix socket, or empty
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, url: str) -> Address:
        """ValueError for anything else."""
        if url.startswith("unix:"):
            path = "/" + url.removeprefix("unix:").lstrip("/")
            if path != "/":
                return cls(path=path)
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname and parts.port:
            return cls(host=parts.hostname, port=parts.port)
        raise ValueError(f"{url!r} is neither unix:/path.sock nor http://host:port")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix:{self.path}" if self.path else f"http://{host}:{self.port}"

    @property
    def base_url(self) -> str:
        return "http://worker" if self.path else str(self)

    def short_path(self) -> str:
        """The socket's path as the kernel takes it: a path that is too long goes by its folder's
        descriptor (Linux).
        """
        if len(os.fsencode(self.path)) <= LONGEST_SOCKET_PATH or not os.path.isdir("/proc/self/fd"):
            return self.path
        folder, name = os.path.split(self.path)
        return f"/proc/self/fd/{_folder_descriptor(folder)}/{name}"

    def connect(self, timeout: float) -> socket.socket:
        """A blocking connection; OSError when nobody listens."""
        if not self.path:
            return socket.create_connection((self.host, self.port), timeout)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout)
        try:
            connection.connect(self.short_path())
        except OSError:
            connection.close()
            raise
        return connection


_descriptors: dict[str, int] = {}


def _folder_descriptor(folder: str) -> int:
    if folder not in _descriptors:
        _descriptors[folder] = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return _descriptors[folder]


def encode(frame: dict[str, Any]) -> str:
    return json.dumps(frame, ensure_ascii=False, separators=(",", ":"))


def request_as_dict(request: Request) -> dict[str, Any]:
    return asdict(request)


def request_from_dict(fields: dict[str, Any]) -> Request:
    """TypeError or ValueError when the fields are not a request's."""
    adapter, prompt_ids = fields.get("adapter"), fields.get("prompt_ids")
    sampling = dict(fields.get("sampling") or {})
    return Request(
        id=str(fields["id"]),
        messages=tuple(
            {name: turn[name] for name in TURN if name in turn}
            for turn in fields.get("messages") or ()
        ),
        text=None if fields.get("text") is None else str(fields["text"]),
        prompt_ids=None if prompt_ids is None else tuple(prompt_ids),
        begun=str(fields.get("begun") or ""),
        tools=tuple(fields.get("tools") or ()),
        must_call=tuple(fields.get("must_call") or ()),
        adapter=AdapterRef(**adapter) if adapter else None,
        sampling=SamplingParams(
            **{
                **sampling,
                "stop": tuple(sampling.get("stop") or ()),
                "logit_bias": tuple(map(tuple, sampling.get("logit_bias") or ())),
            }
        ),
        user=str(fields.get("user") or ""),
        untidied=bool(fields.get("untidied")),
        resembles=str(fields.get("resembles") or ""),
    )
