"""One file over HTTP, to the byte: resumed after a cut, a kill or a restart, checked against its
size and digest.

Bytes go to NAME.part and are renamed when they are complete and right. A later attempt goes on
behind the bytes that are there: the digest tells in the end whether the two parts belong together,
and without one the server is asked by If-Range.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import httpx2

from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.progress import Watch

CHUNK = 1 << 20  # bytes read at a time from a disk
TRIES = 5  # in a row without a single new byte
FIRST_PAUSE = 0.5  # seconds before the first of them, doubled every time
LONGEST_PAUSE = 30.0  # seconds between two tries, also where the server asks for more
RESERVE = 256 << 20  # bytes of a disk that are left free
_BUSY = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Address:
    """Where a file can be had. Headers go to this host alone: the client drops Authorization when
    it is sent to another.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RemoteFile:
    """A file that is wanted: its name below the target folder, its size in bytes, and where to get
    it, tried in order.

    `digest` is "sha256:HEX", "git-sha1:HEX" (a git blob's name) or "" when nobody told one.
    """

    name: str
    size: int
    digest: str
    addresses: tuple[Address, ...]


class _Cut(Exception):
    """The connection ended too early or the server was busy: what has arrived stays, another try
    may go on.
    """

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


def require_space(folder: Path, wanted: int) -> None:
    """FetchFailed("disk_full") unless `wanted` bytes and a reserve are free on the disk."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if wanted + RESERVE > free:
        raise _disk_full(wanted + RESERVE, free)


def _disk_full(wanted: int, free: int) -> FetchFailed:
    return FetchFailed(
        "disk_full",
        f"{wanted / 2**20:,.0f} MiB are needed on the disk and {free / 2**20:,.0f} MiB are free",
        wanted=f"{wanted / 2**20:,.0f}",
        free=f"{free / 2**20:,.0f}",
    )


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A disk that fills up under way is told as what it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _disk_full(RESERVE, shutil.disk_usage(folder).free) from error


class _Part:
    """The bytes that are there so far, with their running digests."""

    def __init__(self, path: Path, file: RemoteFile, watch: Watch):
        self.path, self.file, self.watch = path.with_name(path.name + ".part"), file, watch
        self._note = path.with_name(path.name + ".part.json")
        self.have, self.validator = 0, ""
        # no link is followed: the folder is ours, what lies in it should be too
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._stream: BinaryIO = os.fdopen(os.open(self.path, flags, 0o600), "r+b")
        self._begin()
        self._read_what_is_there()

    def _begin(self) -> None:
        self.have = 0
        self._sha256 = hashlib.sha256()
        self._git = None  # the name of a git blob, only where that is what we know
        if self.file.digest.startswith("git-sha1:"):
            self._git = hashlib.sha1(b"blob %d\0" % self.file.size, usedforsecurity=False)

    def _read_what_is_there(self) -> None:
        """Goes on only with bytes that this very file began with: the note beside them says which
        it was.
        """
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            note = None
        same = (
            isinstance(note, dict)
            and note.get("size") == self.file.size
            and note.get("digest") == self.file.digest
        )
        if not same or not (self.file.digest or note.get("validator")):
            self.restart()
            return
        self.validator = str(note.get("validator", ""))
        while chunk := self._stream.read(CHUNK):
            self._count(chunk)
            self.watch.at(self.file.name, self.have)
        if self.have > self.file.size:
            self.restart()

    def restart(self) -> None:
        """Throws away what is there."""
        self._stream.seek(0)
        self._stream.truncate()
        self._begin()
        self.remember("")
        self.watch.at(self.file.name, 0)

    def remember(self, validator: str) -> None:
        self.validator = validator
        note = {"size": self.file.size, "digest": self.file.digest, "validator": validator}
        self._note.write_text(json.dumps(note), encoding="utf-8")

    def write(self, chunk: bytes) -> None:
        if self.have + len(chunk) > self.file.size:
            raise FetchFailed(
                "size_mismatch",
                f"{self.file.name} is larger than the {self.file.size} bytes announced",
                file=self.file.name,
            )
        self._stream.write(chunk)
        self._count(chunk)
        self.watch.at(self.file.name, self.have, len(chunk))

    def _count(self, chunk: bytes) -> None:
        self.have += len(chunk)
        self._sha256.update(chunk)
        if self._git is not None:
            self._git.update(chunk)

    def flush(self) -> None:
        self._stream.flush()

    @property
    def is_right(self) -> bool:
        """Whether the digest is the one expected; True when nobody told one."""
        kind, _, expected = self.file.digest.partition(":")
        found = {"sha256": self._sha256, "git-sha1": self._git}.get(kind)
        return found is None or found.hexdigest() == expected.lower()

    def finish(self, path: Path) -> str:
        """Gives the file its name; returns its sha256 (hex)."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.close()
        os.replace(self.path, path)
        self._note.unlink(missing_ok=True)
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._stream.close()


def fetch_file(client: httpx2.Client, file: RemoteFile, path: Path, watch: Watch) -> str:
    """Makes `path` the wanted file and returns its sha256 (hex). A complete one is read and
    checked, not fetched again.

    Raises FetchFailed: not_found | access_denied | connection_lost | unexpected_answer |
    size_mismatch | checksum_mismatch | disk_full; whatever `watch.check` raises passes through, and
    the bytes stay for the next attempt.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not path.is_symlink():
        os.replace(path, path.with_name(path.name + ".part"))
        _mark_complete(path, file)
    with disk_errors(path.parent):
        part = _Part(path, file, watch)
        try:
            _complete(client, file, part, watch)
            return part.finish(path)
        finally:
            part.close()


def _mark_complete(path: Path, file: RemoteFile) -> None:
    """A finished file goes through the same check as a half one."""
    note = {"size": file.size, "digest": file.digest, "validator": "complete"}
    path.with_name(path.name + ".part.json").write_text(json.dumps(note), encoding="utf-8")


def _complete(client: httpx2.Client, file: RemoteFile, part: _Part, watch: Watch) -> None:
    """Tries the addresses in order until the part is complete and right."""
    failure: FetchFailed | None = None
    for address in file.addresses:
        for _again in range(2):  # a damaged file is thrown away and fetched once more
            try:
                _receive_all(client, file, address, part, watch)
            except FetchFailed as failed:
                # what a mirror said tells more than that another could not be reached
                if failure is None or failure.code == "connection_lost":
                    failure = failed
                break
            if part.is_right:
                return
            part.restart()
            failure = FetchFailed(
                "checksum_mismatch",
                f"{file.name} from {_host(address.url)} does not have the right checksum",
                file=file.name,
                host=_host(address.url),
            )
    assert failure is not None
    raise failure


def _receive_all(
    client: httpx2.Client, file: RemoteFile, address: Address, part: _Part, watch: Watch
) -> None:
    """Receives from one address until all bytes are there, going on behind a cut as long as
    anything comes.
    """
    fruitless = 0
    while part.have < file.size or file.size == 0:
        before = part.have
        try:
            _receive(client, file, address, part)
            if part.have < file.size:
                raise _Cut("the connection ended too early")
            return
        except (_Cut, httpx2.TransportError) as cut:
            part.flush()
            fruitless = 0 if part.have > before else fruitless + 1
            if fruitless >= TRIES:
                raise FetchFailed(
                    "connection_lost",
                    f"{_host(address.url)} cannot be reached or breaks off "
                    f"({cut or type(cut).__name__})",
                    host=_host(address.url),
                    reason=str(cut) or type(cut).__name__,
                ) from cut
            _wait(max(getattr(cut, "pause", 0.0), FIRST_PAUSE * 2**fruitless), watch)
        except (
            httpx2.HTTPError,
            httpx2.InvalidURL,
        ) as error:  # too many redirects, a redirect to nowhere
            raise _unexpected(address, str(error)) from error


def _receive(client: httpx2.Client, file: RemoteFile, address: Address, part: _Part) -> None:
    """One request; bytes go to the part as they come."""
    headers = dict(address.headers)
    if part.have:
        headers["Range"] = f"bytes={part.have}-"
        if not file.digest:
            headers["If-Range"] = part.validator
    with client.stream("GET", address.url, headers=headers) as response:
        status = response.status_code
        if status in _BUSY:
            raise _Cut(f"the server answers {status}", _retry_after(response))
        if status in (401, 403):
            raise FetchFailed(
                "access_denied",
                f"{_host(address.url)} does not give out {file.name} ({status})",
                file=file.name,
                host=_host(address.url),
            )
        if status in (404, 410):
            raise FetchFailed(
                "not_found",
                f"{_host(address.url)} has no {file.name}",
                file=file.name,
                host=_host(address.url),
            )
        if status == 416:  # the file there is shorter than what we have: begin anew
            part.restart()
            raise _Cut("the server has fewer bytes than are here already")
        if (
            status not in (200, 206)
            or response.headers.get("content-encoding", "identity") != "identity"
        ):
            raise _unexpected(address, f"HTTP {status}")
        if status == 206:
            found = re.fullmatch(
                r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("content-range", "")
            )
            if found is None or int(found[1]) != part.have:
                part.restart()
                raise _Cut("the server sent another range than was asked for")
        elif part.have:
            part.restart()
        length = response.headers.get("content-length", "")
        if length.isdigit() and part.have + int(length) != file.size:
            raise FetchFailed(
                "size_mismatch",
                f"{file.name} should have {file.size} bytes, {_host(address.url)} has "
                f"{part.have + int(length)}",
                file=file.name,
            )
        validator = response.headers.get("etag", "")
        if not part.have:  # a weak one does not vouch for bytes
            part.remember("" if validator.startswith("W/") else validator)
        for chunk in response.iter_raw():
            part.write(chunk)


def _retry_after(response: httpx2.Response) -> float:
    value = response.headers.get("retry-after", "")
    return min(float(value), LONGEST_PAUSE) if value.isdigit() else 0.0


def _wait(seconds: float, watch: Watch) -> None:
    """Sleeps, and hears a wish to stop in between."""
    end = time.monotonic() + min(seconds, LONGEST_PAUSE)
    while (left := end - time.monotonic()) > 0:
        watch.check()
        time.sleep(min(left, 0.25))


def _host(url: str) -> str:
    """The host alone: an address may carry a password."""
    try:
        return httpx2.URL(url).host or url[:40]
    except httpx2.InvalidURL:
        return url[:40]


def _unexpected(address: Address, reason: str) -> FetchFailed:
    host = _host(address.url)
    return FetchFailed(
        "unexpected_answer",
        f"{host} answers in an unexpected way: {reason}",
        host=host,
        reason=reason,
    )


def copy_file(source: BinaryIO, file: RemoteFile, path: Path, watch: Watch) -> str:
    """fetch_file for a file that is open: copied, checked, its sha256 returned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _Part(path, RemoteFile(file.name, file.size, file.digest, ()), watch)
    part.restart()
    try:
        with disk_errors(path.parent):
            while chunk := source.read(CHUNK):
                part.write(chunk)
            if part.have != file.size or not part.is_right:
                part.restart()
                raise FetchFailed(
                    "checksum_mismatch",
                    f"{file.name} does not have the checksum or size that it must have",
                    file=file.name,
                    host="",
                )
            return part.finish(path)
    finally:
        part.close()
