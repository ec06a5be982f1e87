"""From the bytes that somebody uploaded to plain text files: archives unpacked under limits,
workbooks read, encodings recognised. No Django.

An upload is hostile until proved otherwise: nothing is written under a name from inside an archive,
and everything is counted while it is read (bytes, ratio, members), never believed from a header.
Python's `extractall` is never used (CVE-2025-4517 and kin).
"""

from __future__ import annotations

import codecs
import gzip
import re
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any

from tuning.datasets.findings import DatasetRejected, printable, problem, rejected
from tuning.datasets.workbooks import rows_of_workbook

CHUNK = 1 << 18
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".xlsx")
UTF_8, UTF_8_BOM, GB18030 = "utf-8", "utf-8-sig", "gb18030"
_EXTENDED = (b"x", b"g", b"X", b"L", b"K")  # types of a tar's entries that describe others
_LONGEST_HEADER, _LONGEST_GLOBAL = 8 << 10, 1 << 10  # bytes of such an entry; a path has 4 KB
_MOST_HEADERS = 8  # such entries before one member: long name, long link, PAX; global ones
_BOMS = {  # UTF-32's first: it begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# What files begin with that hold rows, or may, but are not read here. Parquet and Arrow would need
# pyarrow: 50 MB of native code to unpack columns beyond every budget, for a form whose owners have
# pandas or datasets at hand, which write JSON lines in one line.
_FOREIGN = {
    b"PAR1": ("columnar_file", "Parquet"),
    b"ARROW1": ("columnar_file", "Arrow"),
    b"\xff\xff\xff\xff": ("columnar_file", "Arrow"),  # a stream, as datasets' cache has it
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("foreign_workbook", "Excel 97 (.xls)"),
    b"7z\xbc\xaf\x27\x1c": ("foreign_archive", "7-Zip"),
    b"Rar!\x1a\x07": ("foreign_archive", "RAR"),
    b"BZh": ("foreign_archive", "bzip2"),
    b"\xfd7zXZ\x00": ("foreign_archive", "xz"),
    b"\x28\xb5\x2f\xfd": ("foreign_archive", "Zstandard"),
}
_FOREIGN_PARTS = {  # a zip that has this member
    "xl/workbook.bin": "Excel (.xlsb)",
    "Index/Document.iwa": "Numbers",
    "content.xml": "OpenDocument (.ods)",
}
_ZIP, _WORKBOOK = b"PK\x03\x04", "xl/workbook.xml"
_RATIO_FREE = 16 << 20  # bytes below which no ratio is suspicious


@dataclass(frozen=True)
class Limits:
    max_bytes: int = 200 << 20  # of the upload, and of everything unpacked from it together
    max_ratio: int = 200  # unpacked : packed; text packs 3 to 20 times, a gzip bomb 1,028 times
    max_members: int = 1000
    max_line_bytes: int = 4 << 20


@dataclass
class Source:
    """One data file of an upload, readable from its start. `name`: as it was called, for people and
    for its suffix alone. `encoding`: of `file`; `was_encoding`: of what was uploaded.
    """

    name: str
    file: IO[bytes]
    encoding: str = UTF_8
    was_encoding: str = UTF_8
    notes: list[dict[str, Any]] = field(default_factory=list)


class _Budget:
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

    def __init__(self, file: IO[bytes] | gzip.GzipFile, budget: _Budget):
        self._file, self._budget = file, budget

    def read(self, size: int = CHUNK) -> bytes:
        data = self._file.read(size)
        self._budget.spend(len(data))
        return data


def open_sources(file: IO[bytes], name: str, limits: Limits, sheet: str = "") -> list[Source]:
    """The data files of an upload: itself, or the members of a .gz, .zip, .tar or .tar.gz as
    anonymous temporary files. `sheet`: which one of a workbook; "" is the first.

    Raises DatasetRejected.
    """
    size = _size(file)
    if size > limits.max_bytes:
        raise rejected("too_large", limit=limits.max_bytes >> 20)
    notes: list[dict[str, Any]] = []
    budget = _Budget(limits, size)
    sources = []
    for member, stream in _members(file, name, limits, budget, notes):
        copy = file
        if stream is not file:
            copy = tempfile.TemporaryFile()  # noqa: SIM115, closed with its Source
            with _damage_named(member):
                shutil.copyfileobj(stream, copy, CHUNK)
        sources.append(_source(member, copy, limits, budget, notes, sheet))
    if not sources:
        raise DatasetRejected([problem("no_data_file", suffixes=" ".join(DATA_SUFFIXES)), *notes])
    sources[0].notes = notes
    return sources


def _source(
    name: str,
    file: IO[bytes],
    limits: Limits,
    budget: _Budget,
    notes: list[dict[str, Any]],
    sheet: str,
) -> Source:
    """A file that is unpacked no further: text, or a workbook. Another form is refused by name."""
    file.seek(0)
    start = file.read(16)
    for magic, (code, form) in _FOREIGN.items():
        if start.startswith(magic):
            raise rejected(code, form=form)
    if not start.startswith(_ZIP):
        return as_text(name, file)
    _check_directory(file, limits)
    with _damage_named(name), zipfile.ZipFile(file) as archive:
        if _WORKBOOK not in archive.namelist():
            raise rejected("foreign_archive", form="zip")
        rows = rows_of_workbook(file, archive, budget.spend, notes, sheet)
    return Source(str(PurePosixPath(name).with_suffix(".xlsx")), rows)


def read_head(file: IO[bytes], name: str, limits: Limits, size: int = 1 << 20) -> tuple[str, bytes]:
    """(name, first bytes) of an upload's first data file, without reading the rest."""
    notes: list[dict[str, Any]] = []
    budget = _Budget(limits, _size(file))
    for member, stream in _members(file, name, limits, budget, notes):
        with _damage_named(member):
            head = stream.read(size)
            if head.startswith((_ZIP, *_FOREIGN)):
                source = open_sources(file, name, limits)[0]
                source.file.seek(0)
                return source.name, source.file.read(size)
            return member, head
    raise DatasetRejected([problem("no_data_file", suffixes=" ".join(DATA_SUFFIXES)), *notes])


def _size(file: IO[bytes]) -> int:
    file.seek(0, 2)
    size = file.tell()
    file.seek(0)
    return size


class _damage_named:
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


def _members(
    file: IO[bytes], name: str, limits: Limits, budget: _Budget, notes: list[dict[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """(name, stream) of each data file, one after another; a stream is valid until the next one is
    asked for.
    """
    magic = file.read(512)
    file.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        with _damage_named(name), gzip.GzipFile(fileobj=file) as unzipped:
            is_tar = unzipped.read(512)[257:262] == b"ustar"
        file.seek(0)
        counted = _Counted(gzip.GzipFile(fileobj=file), budget)
        if is_tar:
            yield from _tar_members(counted, name, limits, notes)
        else:
            yield PurePosixPath(name).name.removesuffix(".gz"), counted
    elif magic.startswith((_ZIP, b"PK\x05\x06")):
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
    with _damage_named(name), tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as archive:
        for number, member in enumerate(archive):
            if number >= limits.max_members:
                raise rejected("archive_members", limit=limits.max_members)
            if not member.isdir() and _is_data(member.name, member.isreg(), notes):
                yield printable(PurePosixPath(member.name).name), archive.extractfile(member)


def _zip_members(
    file: IO[bytes], name: str, limits: Limits, budget: _Budget, notes: list[dict[str, Any]]
) -> Iterator[tuple[str, Any]]:
    _check_directory(file, limits)
    with _damage_named(name), zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        for part, form in _FOREIGN_PARTS.items():
            if part in names:
                raise rejected("foreign_workbook", form=form)
        if _WORKBOOK in names:
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
                yield printable(PurePosixPath(member.filename).name), _Counted(stream, budget)


def _check_directory(file: IO[bytes], limits: Limits) -> None:
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


def as_text(name: str, file: IO[bytes], whole: bool = True) -> Source:
    """The file with its encoding recognised. What keeps no line ends as bytes (UTF-16, UTF-32) is
    written anew as UTF-8. `whole`: false where the file may be cut inside a character.

    Raises DatasetRejected where a file is not what its first bytes say.
    """
    encoding = recognise_encoding(file, whole)
    if not encoding.startswith(("utf-16", "utf-32")):
        return Source(name, file, encoding, encoding)
    decoder = codecs.getincrementaldecoder(encoding)()
    copy = tempfile.TemporaryFile()  # noqa: SIM115, closed with its Source
    try:
        while data := file.read(CHUNK):
            copy.write(decoder.decode(data).encode())
        copy.write(decoder.decode(b"", final=whole).encode())
    except UnicodeError:
        raise rejected("broken_encoding", encoding=encoding.upper()) from None
    finally:
        file.seek(0)
    return Source(name, copy, UTF_8, encoding)


def recognise_encoding(file: IO[bytes], whole: bool = True) -> str:
    """utf-8, utf-8-sig, gb18030, utf-16(-le, -be) or utf-32, by its first bytes or by decoding the
    whole file piece by piece; leaves the file at its start.

    UTF-8 with some broken bytes stays utf-8, so that each broken line is named: text whose first
    Chinese characters were valid UTF-8 is not GB18030.
    """
    file.seek(0)
    first = file.read(CHUNK)
    if first.startswith(codecs.BOM_UTF8):
        file.seek(0)
        return UTF_8_BOM
    wide = next((name for bom, name in _BOMS.items() if first.startswith(bom)), "")
    if wide or (wide := _without_bom(first)):
        file.seek(0)
        return wide
    decoder = codecs.getincrementaldecoder(UTF_8)()
    chinese = 0
    data = first
    try:
        while data:
            try:
                text = decoder.decode(data)
            except UnicodeDecodeError as fault:
                chinese += _chinese(fault.object[: fault.start].decode(UTF_8, errors="ignore"))
                raise
            if chinese < 4 and not text.isascii():
                chinese += _chinese(text)
            data = file.read(CHUNK)
        decoder.decode(b"", final=whole)
        return UTF_8
    except UnicodeDecodeError:
        return UTF_8 if chinese >= 4 or not _decodes(file, GB18030, whole) else GB18030
    finally:
        file.seek(0)


def _without_bom(first: bytes) -> str:
    """UTF-16 without a mark shows by the zeros of its ASCII: brackets, quotation marks, names."""
    first = first[:64]
    even, odd = first[0::2].count(0), first[1::2].count(0)
    most = max(even, odd)  # the other half has few: 一 (U+4E00) is a common character
    if len(first) < 8 or most * 5 < len(first) // 2 or min(even, odd) * 3 > most:
        return ""
    return "utf-16-le" if odd == most else "utf-16-be"


def _chinese(text: str) -> int:
    return sum("\u4e00" <= character <= "\u9fff" for character in text)


def _decodes(file: IO[bytes], encoding: str, whole: bool) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    file.seek(0)
    try:
        while data := file.read(CHUNK):
            decoder.decode(data)
        decoder.decode(b"", final=whole)
        return True
    except UnicodeDecodeError:
        return False
