"""Folders and archives of this machine as sources. Only needed regular files come over; no link is
followed, nothing is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.progress import Watch
from chat.checkpoints.fetch.transfer import CHUNK, RemoteFile, copy_file
from chat.checkpoints.fetch.wanted import needed_files
from chat.checkpoints.safe_files import UnsafeFile, file_sizes, open_inside

ENTRIES = 10_000  # of a folder or an archive
_HEADER_BYTES = 64 << 10  # of an extended tar header


def folder_files(folder: Path) -> dict[str, int]:
    """{name: bytes} of the needed files."""
    try:
        sizes = file_sizes(folder)
    except UnsafeFile as error:
        raise FetchFailed(
            "unsafe_file", str(error), file=error.name, reason=error.reason
        ) from error
    except OSError as error:
        raise FetchFailed(
            "path_missing", f"{folder} cannot be read: {error}", path=str(folder)
        ) from error
    return {name: sizes[name] for name in needed_files(sizes)}


def copy_folder(folder: Path, target: Path, watch: Watch) -> dict[str, str]:
    """Copies the needed files; returns {name: sha256}."""
    sizes = folder_files(folder)
    watch.plan(sizes.items())
    watch.phase("downloading")
    digests = {}
    for name, size in sizes.items():
        try:
            with open_inside(folder, name) as stream:
                digests[name] = copy_file(
                    stream, RemoteFile(name, size, "", ()), target / name, watch
                )
        except UnsafeFile as error:
            raise FetchFailed("unsafe_file", str(error), file=name, reason=error.reason) from error
    return digests


class _PlainMember(tarfile.TarInfo):
    """Refuses extended headers beyond a few KiB before they are parsed: older Pythons take hours
    over some.
    """

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in (b"x", b"g", b"X", b"L", b"K") and self.size > _HEADER_BYTES:
            raise tarfile.HeaderError("an extended header is too long")
        return super()._proc_member(archive)  # type: ignore[misc]


def _members(path: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """(path inside, bytes, stream) of every regular file, in order."""
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for number, entry in enumerate(archive.infolist()):
                _few(number, path)
                if not entry.is_dir() and not stat.S_ISLNK(entry.external_attr >> 16):
                    with archive.open(entry) as stream:
                        yield entry.filename, entry.file_size, stream
        return
    with tarfile.open(path, "r|*", tarinfo=_PlainMember) as archive:
        for number, member in enumerate(archive):
            _few(number, path)
            plain = member.isreg() and not member.issparse()
            if plain and (content := archive.extractfile(member)) is not None:
                yield member.name, member.size, content


def _few(number: int, path: Path) -> None:
    if number >= ENTRIES:
        raise FetchFailed(
            "too_many_files", f"{path.name} holds more than {ENTRIES} entries", path=path.name
        )


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise FetchFailed(
            "archive_damaged",
            f"{path.name} cannot be unpacked: {error}",
            file=path.name,
            reason=error,
        ) from error


def archive_files(path: Path, watch: Watch) -> dict[str, int]:
    """{path inside: bytes} of the needed files: those of the one folder that holds config.json, or
    of the one GGUF file.
    """
    folders: dict[str, dict[str, int]] = {}
    with _damage(path):
        for name, size, _stream in _members(path):
            watch.check()
            pure = PurePosixPath(name.replace("\\", "/"))
            if pure.is_absolute() or ".." in pure.parts:
                raise FetchFailed(
                    "archive_damaged",
                    f"{path.name} holds a path that leads out of it",
                    file=path.name,
                    reason=name,
                )
            folders.setdefault(str(pure.parent), {})[pure.name] = size
    models = [
        name for name, files in folders.items() if "config.json" in files and _has_weights(files)
    ]
    models = models or [name for name, files in folders.items() if _has_weights(files)]
    if len(models) > 1:
        raise FetchFailed(
            "several_models",
            f"{path.name} holds several models: {', '.join(models)}",
            files=", ".join(models),
        )
    if not models:
        raise FetchFailed("no_weights", f"{path.name} holds no weights")
    files = folders[models[0]]
    prefix = "" if models[0] == "." else f"{models[0]}/"
    return {prefix + name: files[name] for name in needed_files(files)}


def _has_weights(files: dict[str, int]) -> bool:
    try:
        needed_files(files)
    except FetchFailed as failed:
        return failed.code != "no_weights"
    return True


def unpack(path: Path, target: Path, files: dict[str, int], watch: Watch) -> dict[str, str]:
    """Writes the wanted members into `target` under their last names; returns {name: sha256}.

    A member that is longer than it said is damage, found before it fills a disk.
    """
    digests = {}
    names = {inside: PurePosixPath(inside).name for inside in files}
    watch.plan([(names[inside], size) for inside, size in files.items()])
    watch.phase("unpacking")
    with _damage(path):
        for name, size, stream in _members(path):
            watch.check()
            inside = str(PurePosixPath(name.replace("\\", "/")))
            if inside not in files:
                continue
            last, done, digest = names[inside], 0, hashlib.sha256()
            with open(target / last, "wb") as file:
                while chunk := stream.read(CHUNK):
                    done += len(chunk)
                    if done > size:
                        break
                    file.write(chunk)
                    digest.update(chunk)
                    watch.at(last, done, len(chunk))
            if done != size:
                raise FetchFailed(
                    "archive_damaged",
                    f"{name} has another length than it says",
                    file=path.name,
                    reason=name,
                )
            digests[last] = digest.hexdigest()
    return digests
