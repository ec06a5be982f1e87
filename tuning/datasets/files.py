"""The files of dataset splits, named by what they hold; they are read and written here alone.

Below DATA_DIR/datasets: SHA256.jsonl, one example a line ({"prompt", "response", "history"?}), and
SHA256.idx, the offsets of the lines and of the end as little-endian 64-bit integers. Nothing has
its final name before the whole upload is good.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import struct
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from django.conf import settings


def _folder() -> Path:
    folder = settings.DATA_DIR / "datasets"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def paths_of(sha256: str) -> tuple[Path, Path]:
    return _folder() / f"{sha256}.jsonl", _folder() / f"{sha256}.idx"


@contextlib.contextmanager
def files_locked() -> Iterator[None]:
    """Held while files get their names or lose them, so that a delete never takes a file that an
    upload has just found present.
    """
    with open(_folder() / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Writer:
    """Writes canonical lines to a temporary file beside the others; `publish` gives it its name,
    leaving the block drops it.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._offsets = array("Q", [0])
        descriptor, path = tempfile.mkstemp(prefix=".incoming-", dir=_folder())
        self._file, self._path = os.fdopen(descriptor, "wb"), Path(path)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def write(self, lines: Iterable[bytes]) -> None:
        end, block, size, append = self._offsets[-1], [], 0, self._offsets.append
        for line in lines:
            end += len(line)
            append(end)
            block.append(line)
            size += len(line)
            if size > 1 << 18:
                self._flush(block)
                block, size = [], 0
        self._flush(block)

    def _flush(self, block: list[bytes]) -> None:
        data = b"".join(block)
        self._digest.update(data)
        self._file.write(data)

    def publish(self) -> dict[str, Any]:
        """The split's entry in a version: {"sha256", "rows", "bytes"}."""
        self._file.flush()
        os.fsync(self._file.fileno())
        sha256 = self._digest.hexdigest()
        rows, index = paths_of(sha256)
        if not (rows.exists() and index.exists()):
            if sys.byteorder == "big":
                self._offsets.byteswap()
            temporary = self._path.with_suffix(".idx")
            with open(temporary, "wb") as file:
                self._offsets.tofile(file)
            os.replace(temporary, index)
            os.replace(self._path, rows)
        return {"sha256": sha256, "rows": len(self._offsets) - 1, "bytes": rows.stat().st_size}


class Split:
    """The rows of one split by number: `split[7]` -> {"prompt", "response", "history", "line"};
    `line` counts from 1.

    The file is mapped into memory, so a page costs the same at any offset. Closes as a context
    manager or by itself.
    """

    def __init__(self, sha256: str):
        path, index = paths_of(sha256)
        with open(index, "rb") as file:
            self._offsets = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with open(path, "rb") as file:
            self._rows = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self) -> Split:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        self._offsets.close()
        self._rows.close()

    def __len__(self) -> int:
        return len(self._offsets) // 8 - 1

    def raw(self, row: int) -> bytes:
        """The canonical line of a row."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        start, end = struct.unpack_from("<QQ", self._offsets, 8 * row)
        return self._rows[start:end]

    def has_history(self) -> bool:
        """Whether any row has earlier turns."""
        # Within a text its quotes would be escaped: this is the key.
        return self._rows.find(b'", "history": [[') != -1

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"history": [], **json.loads(self.raw(row)), "line": row + 1}
