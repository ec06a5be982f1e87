"""Reading files of folders that somebody else filled: bounded in time and memory, and never outside
the folder.

A pipe would be waited for without end, a link to a device read without end, a sparse file has any
size it likes: only regular files count, read up to a limit, and a link only where it stays inside.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

ENTRIES = 10_000  # of a folder; a checkpoint has some dozens


class UnsafeFile(Exception):
    """`name` is not a file that may be read. `reason` is a few words of English."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name} {reason}")
        self.name, self.reason = name, reason


def file_sizes(folder: Path) -> dict[str, int]:
    """{name: bytes} of the regular files directly in `folder`, and of links to such that lie where
    `open_inside` reads.

    UnsafeFile for more entries than a checkpoint can have, OSError when the folder cannot be read.
    """
    sizes = {}
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            if number >= ENTRIES:
                raise UnsafeFile(folder.name, f"holds more than {ENTRIES} entries")
            try:
                status = entry.stat()
            except OSError:  # a link to nothing
                continue
            if stat.S_ISREG(status.st_mode):
                sizes[entry.name] = status.st_size
    return sizes


def open_inside(folder: Path, name: str) -> BinaryIO:
    """The regular file `name` of `folder`, opened to be read. FileNotFoundError, or UnsafeFile for
    what is no plain file in there.
    """
    path = folder / name
    if path.is_symlink() and not _stays_inside(folder, path):
        raise UnsafeFile(name, "is a link out of the folder")
    # without O_NONBLOCK the very opening of a pipe waits for somebody who writes
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafeFile(name, "is not a regular file")
    return os.fdopen(descriptor, "rb")


def _stays_inside(folder: Path, path: Path) -> bool:
    """Inside the folder, or, for a snapshot in huggingface_hub's cache, in the blobs beside it."""
    target, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    return target.is_relative_to(home) or (
        home.parent.name == "snapshots" and target.parent == blobs
    )


def read_inside(folder: Path, name: str, most: int) -> bytes:
    """All of a file that has at most `most` bytes."""
    with open_inside(folder, name) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UnsafeFile(name, f"has more than {most} bytes")
    return content


def read_json_inside(folder: Path, name: str, most: int) -> Any:
    """A JSON file's value; ValueError when it is none."""
    try:
        return json.loads(read_inside(folder, name, most).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
