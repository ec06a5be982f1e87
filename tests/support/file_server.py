"""Real HTTP for downloads: a model hub, ModelScope and a package index on a port of this machine,
with faults on demand.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Answer:
    """What a path gives. `redirect`: an address instead of content."""

    content: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    redirect: str = ""


@dataclass
class Fault:
    """One request's misfortune. cut: end after so many bytes; status: this instead; damage: the
    first byte is another; hold: wait for `released` after so many bytes; no_range: the header is
    passed over.
    """

    cut: int | None = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    damage: bool = False
    hold: int | None = None
    no_range: bool = False
    wrong_range: bool = False
    extra: bytes = b""


class FileServer:
    """`answers`: path -> Answer. `faults`: path -> those of the next requests. `requests`: what
    came, as (path with query, headers).
    """

    def __init__(self):
        self.answers: dict[str, Answer] = {}
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.holding, self.released = threading.Event(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_arguments: None  # a client may be killed on purpose
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def url_of_another_host(self) -> str:
        """The same server under another name."""
        return f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def asked(self, part: str) -> list[dict[str, str]]:
        """The headers of the requests whose path holds `part`."""
        return [headers for path, headers in self.requests if part in path]

    def fault(self, path: str, *faults: Fault) -> None:
        self.faults[path].extend(faults)

    # -- what is served

    def add_repository(
        self, name: str, files: Mapping[str, bytes], *, revision: str = "main", **about
    ) -> None:
        """A repository as huggingface_hub asks for it: weights in LFS, the rest as git blobs."""
        siblings = []
        for path, content in files.items():
            entry: dict = {"rfilename": path, "size": len(content), "blobId": git_blob(content)}
            if path.endswith((".safetensors", ".bin", ".gguf")):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
            self.answers[f"/{name}/resolve/{COMMIT}/{path}"] = Answer(content)
        info = {
            "id": name,
            "sha": COMMIT,
            "siblings": siblings,
            "tags": [],
            "gated": False,
            **about,
        }
        for suffix in ("", f"/revision/{revision}", f"/revision/{COMMIT}"):
            self.answers[f"/api/models/{name}{suffix}"] = _json(info)

    def add_modelscope(self, name: str, files: Mapping[str, bytes], licence: str = "") -> None:
        listed = [
            {
                "Path": path,
                "Name": path,
                "Type": "blob",
                "Size": len(content),
                "Sha256": hashlib.sha256(content).hexdigest(),
            }
            for path, content in files.items()
        ]
        base = f"/api/v1/models/{name}"
        self.answers[base] = _json({"Code": 200, "Data": {"License": licence}})
        self.answers[f"{base}/commits"] = _json({"Code": 200, "Data": {"Commit": [{"Id": COMMIT}]}})
        self.answers[f"{base}/repo/files"] = _json({"Code": 200, "Data": {"Files": listed}})
        for path, content in files.items():
            self.answers[f"{base}/repo?{path}"] = Answer(content)

    def add_project(
        self, project: str, files: Mapping[str, bytes], *, html: bool = False, digests: bool = True
    ) -> None:
        """A project of a package index, as PEP 691 JSON or PEP 503 HTML."""
        for name, content in files.items():
            self.answers[f"/files/{name}"] = Answer(content)
        digest = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        if html:
            fragment = {name: f"#sha256={digest[name]}" if digests else "" for name in files}
            links = [
                f'<a href="../../files/{quote(name)}{fragment[name]}">{name}</a>' for name in files
            ]
            page = Answer("".join(links).encode(), headers={"Content-Type": "text/html"})
        else:
            listed = [
                {
                    "filename": name,
                    "url": f"../../files/{quote(name)}",
                    "hashes": {"sha256": digest[name]} if digests else {},
                }
                for name in files
            ]
            page = _json({"files": listed}, "application/vnd.pypi.simple.v1+json")
        self.answers[f"/simple/{project}/"] = page

    # -- how it is served

    def _handler(self) -> Callable[..., BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_arguments) -> None:
                pass

            def do_GET(self) -> None:
                owner.requests.append((self.path, dict(self.headers)))
                parts = urlsplit(self.path)
                path = unquote(parts.path)
                if file := parse_qs(parts.query).get("FilePath"):
                    path += f"?{file[0]}"
                waiting = owner.faults[path]
                fault = waiting.popleft() if waiting else Fault()
                answer = owner.answers.get(path, Answer(b"not here", 404))
                if fault.status:
                    answer = Answer(b"", fault.status, dict(fault.headers))
                if answer.redirect:
                    answer = Answer(b"", 302, {"Location": answer.redirect})
                self._send(answer, fault)

            def _send(self, answer: Answer, fault: Fault) -> None:
                content, status, headers = answer.content, answer.status, dict(answer.headers)
                etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
                if fault.damage:
                    content = bytes([content[0] ^ 255]) + content[1:]
                start = self._start(etag, len(content)) if status == 200 else 0
                if fault.no_range:
                    start = 0
                if start:
                    status = 206
                    first = 0 if fault.wrong_range else start
                    headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                if start > len(content):
                    status, content, headers = 416, b"", {}
                body = content[start:] + fault.extra
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) - len(fault.extra)))
                self.send_header("ETag", etag)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if fault.hold is not None:
                    self.wfile.write(body[: fault.hold])
                    self.wfile.flush()
                    owner.holding.set()
                    owner.released.wait(60)
                    body = body[fault.hold :]
                if fault.cut is not None:
                    body, self.close_connection = body[: fault.cut], True
                try:
                    self.wfile.write(body)
                except OSError:
                    self.close_connection = True

            def _start(self, etag: str, length: int) -> int:
                wanted = self.headers.get("Range", "")
                condition = self.headers.get("If-Range")
                if not wanted.startswith("bytes=") or (condition and condition != etag):
                    return 0
                return int(wanted.removeprefix("bytes=").partition("-")[0])

        return Handler


def _json(value: object, kind: str = "application/json") -> Answer:
    return Answer(json.dumps(value).encode(), headers={"Content-Type": kind})


def git_blob(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
