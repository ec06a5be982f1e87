"""From the bytes that somebody uploaded to plain text files: archives unpacked under limits
(archives.py), workbooks read, encodings recognised. No Django.
"""

from __future__ import annotations

import codecs
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any

from tuning.datasets.archives import (
    DATA_SUFFIXES,
    WORKBOOK,
    ZIP,
    Budget,
    Limits,
    check_directory,
    damage_named,
    members_of,
    size_of,
)
from tuning.datasets.encodings import CHUNK, GB18030, UTF_8, UTF_8_BOM, recognise_encoding
from tuning.datasets.findings import DatasetRejected, problem, rejected
from tuning.datasets.workbooks import rows_of_workbook

__all__ = [
    "CHUNK",
    "DATA_SUFFIXES",
    "GB18030",
    "UTF_8",
    "UTF_8_BOM",
    "Limits",
    "Source",
    "as_text",
    "open_sources",
    "read_head",
    "recognise_encoding",
]

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
# Text that is no data, by how it begins
_NO_DATA = {
    re.compile(rb"version https://git-lfs\.github\.com/"): "lfs_pointer",
    re.compile(rb"<(?:!doctype html|html)\b", re.IGNORECASE): "web_page",
}


@dataclass
class Source:
    """One data file of an upload, readable from its start. `name`: as it was called, for people and
    for its suffix alone. `encoding`: of `file`; `was_encoding`: of what was uploaded.
    """

    name: str
    file: IO[bytes]
    encoding: str = UTF_8
    was_encoding: str = UTF_8
    path: str = ""  # inside its archive, with the folders
    notes: list[dict[str, Any]] = field(default_factory=list)


def open_sources(file: IO[bytes], name: str, limits: Limits, sheet: str = "") -> list[Source]:
    """The data files of an upload: itself, or the members of a .gz, .zip, .tar or .tar.gz as
    anonymous temporary files. `sheet`: which one of a workbook; "" is the first.

    Raises DatasetRejected.
    """
    size = size_of(file)
    if size > limits.max_bytes:
        raise rejected("too_large", limit=limits.max_bytes >> 20)
    notes: list[dict[str, Any]] = []
    budget = Budget(limits, size)
    sources = []
    for member, stream in members_of(file, name, limits, budget, notes):
        copy = file
        if stream is not file:
            copy = tempfile.TemporaryFile()  # noqa: SIM115, closed with its Source
            with damage_named(member):
                shutil.copyfileobj(stream, copy, CHUNK)
        path = member.replace("\\", "/")
        source = _source(PurePosixPath(path).name, copy, limits, budget, notes, sheet)
        source.path = path
        sources.append(source)
    sources = _without_leaflets(sources, notes)
    if not sources:
        raise DatasetRejected([problem("no_data_file", suffixes=" ".join(DATA_SUFFIXES)), *notes])
    sources[0].notes = notes
    return sources


def _without_leaflets(sources: list[Source], notes: list[dict[str, Any]]) -> list[Source]:
    """Beside files that say by their names that they are data, a text file is a leaflet."""
    data = [source for source in sources if not source.name.lower().endswith(".txt")]
    if not data:
        return sources
    for source in sources:
        if source not in data:
            source.file.close()
            notes.append(problem("archive_member", level="warning", member=source.path[:200]))
    return data


def _source(
    name: str,
    file: IO[bytes],
    limits: Limits,
    budget: Budget,
    notes: list[dict[str, Any]],
    sheet: str,
) -> Source:
    """A file that is unpacked no further: text, or a workbook. Another form is refused by name."""
    file.seek(0)
    start = file.read(16)
    for magic, (code, form) in _FOREIGN.items():
        if start.startswith(magic):
            raise rejected(code, form=form)
    if not start.startswith(ZIP):
        return as_text(name, file)
    check_directory(file, limits)
    with damage_named(name), zipfile.ZipFile(file) as archive:
        if WORKBOOK not in archive.namelist():
            raise rejected("foreign_archive", form="zip")
        rows = rows_of_workbook(file, archive, budget.spend, notes, sheet)
    return Source(str(PurePosixPath(name).with_suffix(".xlsx")), rows)


def read_head(file: IO[bytes], name: str, limits: Limits, size: int = 1 << 20) -> tuple[str, bytes]:
    """(name, first bytes) of an upload's first data file, without reading the rest."""
    notes: list[dict[str, Any]] = []
    budget = Budget(limits, size_of(file))
    leaflet: tuple[str, bytes] | None = None
    for member, stream in members_of(file, name, limits, budget, notes):
        with damage_named(member):
            head = stream.read(size)
            if member.lower().endswith(".txt") and stream is not file:
                leaflet = leaflet or (PurePosixPath(member).name, head)
                continue
            if head.startswith((ZIP, *_FOREIGN)):
                source = open_sources(file, name, limits)[0]
                source.file.seek(0)
                return source.name, source.file.read(size)
            return PurePosixPath(member.replace("\\", "/")).name, head
    if leaflet:
        return leaflet
    raise DatasetRejected([problem("no_data_file", suffixes=" ".join(DATA_SUFFIXES)), *notes])


def as_text(name: str, file: IO[bytes], whole: bool = True) -> Source:
    """The file with its encoding recognised. What keeps no line ends as bytes (UTF-16, UTF-32) is
    written anew as UTF-8. `whole`: false where the file may be cut inside a character.

    Raises DatasetRejected where a file is not what its first bytes say.
    """
    encoding = recognise_encoding(file, whole)
    start = file.read(512).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    for pattern, code in _NO_DATA.items():
        if pattern.match(start):
            raise rejected(code)
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
