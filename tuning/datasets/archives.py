"""What is packed in an upload, under limits. No Django.

An upload is hostile until proved otherwise: nothing is written under a name from inside an archive,
and everything is counted while it is read (bytes, ratio, members), never believed from a header.
Python's `extractall` is never used (CVE-2025-4517 and kin).
"""

from __future__ import annotations

import gzip
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from tuning.datasets.encodings import CHUNK
from tuning.datasets.findings import DatasetRejected, printable, problem, rejected

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".xlsx")
ZIP, WORKBOOK = b"PK\x03\x04", "xl/workbook.xml"
_EXTENDED = (b"x", b"g", b"X", b"L", b"K")  # types of a tar's entries that describe others
_LONGEST_HEADER, _LONGEST_GLOBAL = 8 << 10, 1 << 10  # bytes of such an entry; a path has 4 KB
_MOST_HEADERS = 8  # such entries before one member: long name, long link, PAX; global ones
_FOREIGN_PARTS = {  # a zip that has this member
    "xl/workbook.bin": "Excel (.xlsb)",
    "Index/Document.iwa": "Numbers",
    "content.xml": "OpenDocument (.ods)",
}
_RATIO_FREE = 16 << 20  # bytes below which no ratio is suspicious


@dataclass(frozen=True)
class Limits:
    max_bytes: int = 200 << 20  # of the upload, and of everything unpacked from it together
    max_ratio: int = 200  # unpacked : packed; text packs 3 to 20 times, a gzip bomb 1,028 times
    max_members: int = 1000
    max_line_bytes: int = 4 << 20
    max_lines: int = 20_000_000  # every line costs, also a blank one


class Budget:
    """Counts unpacked bytes against the limits."""

    def __init__(self, limits: Limits, packed: int):
        self.limits, self.packed, self.unpacked = limits, packed, 0

    def spend(self, count: int) -> None:
        self.unpacked += count
        if self.unpacked > self.limits.max_bytes:
            raise rejected("too_large", limit=self.limits.max_bytes >> 20)
        if self.unpacked > _RATIO_FREE and self.unpacked > self.limits.max_ratio * self.packed:
            raise rejected("archive_bomb", ratio=self.limits.max_ratio)


class _Counted:
    """A readable file whose every byte is spent from a budget, also those that tarfile reads to
    skip.
    """

    def __init__(self, file: IO[bytes] | gzip.GzipFile, budget: Budget):
        self._file, self._budget = file, budget

    def read(self, size: int = CHUNK) -> bytes:
        data = self._file.read(size)
        self._budget.spend(len(data))
        return data


def size_of(file: IO[bytes]) -> int:
    file.seek(0, 2)
    size = file.tell()
    file.seek(0)
    return size


class damage_named:
    """What the standard library raises on broken or encrypted archives, as one rejection."""

    def __init__(self, member: str):
        self.member = member

    def __enter__(self):
        return self

    def __exit__(self, kind, fault, traceback):
        broken = (
            OSError,
            EOFError,
            zlib.error,
            zipfile.BadZipFile,
            tarfile.TarError,
            NotImplementedError,
            RuntimeError,
        )
        if isinstance(fault, (*broken, struct.error, UnicodeDecodeError, ValueError)):
            raise DatasetRejected(
                [problem("archive_damaged", member=self.member, detail=str(fault)[:200])]
            ) from fault
        return False


def members_of(
    file: IO[bytes], name: str, limits: Limits, budget: Budget, notes: list[dict[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """(name, stream) of each data file, one after another; a stream is valid until the next one is
    asked for.
    """
    magic = file.read(512)
    file.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        with damage_named(name), gzip.GzipFile(fileobj=file) as unzipped:
            is_tar = unzipped.read(512)[257:262] == b"ustar"
        file.seek(0)
        counted = _Counted(gzip.GzipFile(fileobj=file), budget)
        if is_tar:
            yield from _tar_members(counted, name, limits, notes)
        else:
            yield PurePosixPath(name).name.removesuffix(".gz"), counted
    elif magic.startswith((ZIP, b"PK\x05\x06")):
        yield from _zip_members(file, name, limits, budget, notes)
    elif magic[257:262] == b"ustar":
        yield from _tar_members(_Counted(file, budget), name, limits, notes)
    else:
        yield name, file


def _is_data(path: str, regular: bool, notes: list[dict[str, Any]]) -> bool:
    """Does an archive's member hold rows? What is passed over is noted, the clutter of macOS left
    out.
    """
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if not parts or parts[0] == "__MACOSX" or parts[-1].startswith("."):
        return False
    if regular and parts[-1].lower().endswith(DATA_SUFFIXES):
        return True
    if len(notes) < 20:
        notes.append(problem("archive_member", level="warning", member=path[:200]))
    return False


class _Member(tarfile.TarInfo):
    """A tar's entry whose own description costs little. tarfile reads the entries that describe
    the next one (long names, PAX records) as a whole, searches them with a regular expression
    whose time grows with the square of their length (CVE-2024-6232), lets records overlap, and
    reads maps of sparse files without an end.
    """

    def _proc_member(self, archive):
        longest = _LONGEST_GLOBAL if self.type == b"g" else _LONGEST_HEADER
        if self.type == b"S" or (self.type in _EXTENDED and self.size > longest):
            raise tarfile.HeaderError(f"an entry of type {self.type.decode()}, {self.size} bytes")
        before = getattr(archive, "describing", 0)
        archive.describing = before + 1 if self.type in _EXTENDED else 0
        if before >= _MOST_HEADERS:
            raise tarfile.HeaderError("too many entries that describe one member")
        return super()._proc_member(archive)

    def _proc_pax(self, archive):
        stream = archive.fileobj
        records = stream.read(self._block(self.size))
        _check_pax(records[: self.size])
        archive.fileobj = _Again(records, stream)
        try:
            return super()._proc_pax(archive)
        finally:
            archive.fileobj = stream

    def _refuse_sparse(self, *_arguments):
        raise tarfile.HeaderError("a sparse file")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class _Again:
    """A stream whose first read gives `first`, which was read from it already."""

    def __init__(self, first: bytes, stream):
        self.first, self.stream = first, stream

    def read(self, size: int) -> bytes:
        first, self.first = self.first, b""
        return first or self.stream.read(size)

    def tell(self) -> int:
        return self.stream.tell()


def _check_pax(records: bytes) -> None:
    """HeaderError unless the records stand one after another, as "LENGTH KEY=VALUE\n"."""
    if re.search(rb"\d{256}", records):
        raise tarfile.HeaderError("a number of more than 255 digits")
    while records.strip(b"\0"):
        length, space, _rest = records[:8].partition(b" ")
        end = int(length) if space and length.isdigit() else 0
        record = records[:end]
        if b"=" not in record or not record.endswith(b"\n"):
            raise tarfile.HeaderError("a damaged record")
        records = records[end:]


def _tar_members(
    stream: Any, name: str, limits: Limits, notes: list[dict[str, Any]]
) -> Iterator[tuple[str, Any]]:
    with damage_named(name), tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as archive:
        for number, member in enumerate(archive):
            if number >= limits.max_members:
                raise rejected("archive_members", limit=limits.max_members)
            if not member.isdir() and _is_data(member.name, member.isreg(), notes):
                yield printable(member.name), archive.extractfile(member)


def _zip_members(
    file: IO[bytes], name: str, limits: Limits, budget: Budget, notes: list[dict[str, Any]]
) -> Iterator[tuple[str, Any]]:
    check_directory(file, limits)
    with damage_named(name), zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        for part, form in _FOREIGN_PARTS.items():
            if part in names:
                raise rejected("foreign_workbook", form=form)
        if WORKBOOK in names:
            file.seek(0)
            yield name, file
            return
        for member in archive.infolist():
            kind = member.external_attr >> 28  # the Unix file type: 0 unknown, 8 regular
            if member.is_dir() or not _is_data(member.filename, kind in (0, 8), notes):
                continue
            if member.flag_bits & 1:
                raise rejected("archive_encrypted")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # LZMA could ask for gigabytes of dictionary
                raise NotImplementedError("compression method")
            with archive.open(member) as stream:
                yield printable(member.filename), _Counted(stream, budget)


def check_directory(file: IO[bytes], limits: Limits) -> None:
    """Refuses a zip whose directory is huge before zipfile reads all of it into memory."""
    end = file.seek(0, 2)
    file.seek(max(0, end - (22 + 65535)))
    tail = file.read()
    file.seek(0)
    at = tail.rfind(b"PK\x05\x06")
    if at >= 0 and len(tail) >= at + 22:
        entries, size = struct.unpack_from("<HI", tail, at + 10)
        # ZIP64 shows itself as 0xFFFF too
        if entries > limits.max_members or size > limits.max_members * 1024:
            raise rejected("archive_members", limit=limits.max_members)
