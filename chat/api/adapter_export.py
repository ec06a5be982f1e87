"""An adapter as people take it away: the portal's own folder and, beside it, peft's. Without torch:
it is one array.
"""

import asyncio
import functools
import json
import tempfile
import threading
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO

import numpy as np
from django.http import FileResponse

from chat.checkpoints.adapter_files import (
    DESCRIPTION,
    PEFT_CONFIG,
    PEFT_TENSOR,
    PEFT_WEIGHTS,
    TENSOR,
    WEIGHTS,
    peft_config,
)
from chat.models import Adapter

LONGEST_HEADER = 1 << 20  # bytes of a safetensors header
PIECE = 1 << 16
README = """adapter.safetensors, adapter.json: the prefix as the portal serves it
(`manage.py import_adapter` reads it).
peft/: the same prefix for peft: PeftModel.from_pretrained(base_model, "peft").
ChatGLM-6B's own format (pytorch_model.bin):
`manage.py export_adapter NAME --format upstream --output FOLDER`.
"""


class AdapterUnreadable(Exception):
    """What lies on the disk is no adapter any more."""


def archive(adapter: Adapter) -> IO[bytes]:
    """A zip in a temporary file, at its beginning. AdapterUnreadable when the adapter's files are
    gone or damaged. A large adapter has hundreds of megabytes: none of it is read as a whole.
    """
    weights, description = adapter.path / WEIGHTS, adapter.path / DESCRIPTION
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the response closes it
    try:
        # random numbers do not compress
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target:
            target.write(description, DESCRIPTION)
            target.write(weights, WEIGHTS)
            target.writestr("README.txt", README)
            prefix = map_prefix(weights)
            target.writestr(
                f"peft/{PEFT_CONFIG}",
                json.dumps(peft_config(prefix.shape, adapter.checkpoint.name), indent=2),
            )
            with target.open(f"peft/{PEFT_WEIGHTS}", "w", force_zip64=True) as peft:
                write_peft_weights(prefix, peft)
    except (OSError, KeyError, TypeError, ValueError) as error:
        file.close()
        raise AdapterUnreadable(str(error)) from error
    file.seek(0)
    return file


def map_prefix(weights: Path) -> np.ndarray:
    """[layers, 2, kv_heads, pre_seq_len, head_dim] of a safetensors file, read as it is looked at;
    bfloat16, which numpy lacks, as uint16.
    """
    with open(weights, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise ValueError("the header is too long")
        found = json.loads(file.read(length))[TENSOR]
    dtype = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2"}[found["dtype"]]
    start = 8 + length + found["data_offsets"][0]
    prefix = np.memmap(weights, dtype, "r", start, tuple(found["shape"]))
    if prefix.ndim != 5:
        raise ValueError("this is no prefix")
    return prefix


def write_peft_weights(prefix: np.ndarray, file: IO[bytes]) -> None:
    """peft's (and ChatGLM-6B's) order of a prefix without projection, as safetensors:
    [pre_seq_len, layers * 2 * kv_heads * head_dim] of float32.
    """
    layers, two, kv_heads, pre_seq_len, head_dim = prefix.shape
    width = layers * two * kv_heads * head_dim
    described = {
        "dtype": "F32",
        "shape": [pre_seq_len, width],
        "data_offsets": [0, 4 * pre_seq_len * width],
    }
    header = json.dumps({PEFT_TENSOR: described}).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for token in range(pre_seq_len):
        row = np.ascontiguousarray(prefix[:, :, :, token, :])
        if row.dtype == np.uint16:
            row = (row.astype(np.uint32) << 16).view(np.float32)
        file.write(row.astype("<f4").tobytes())


class Download(FileResponse):
    """Under ASGI Django would read the whole file into a list first; here each piece is read when
    the one before has gone to the client. `ended` is called once, also when the client leaves.
    """

    def __init__(self, file: IO[bytes], filename: str, ended: Callable[[], None]):
        super().__init__(
            file, as_attachment=True, filename=filename, content_type="application/zip"
        )
        self._resource_closers.append(ended)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while piece := await asyncio.to_thread(self.file_to_stream.read, PIECE):
            yield piece


class Downloads:
    """How many each user has running: their archives lie on the disk as long."""

    def __init__(self, most: int = 8):
        self.most, self._running, self._lock = most, Counter[int](), threading.Lock()

    def begin(self, user: int) -> Callable[[], None] | None:
        """What ends it; None when the user has too many. Ending twice is ending once."""
        with self._lock:
            if self._running[user] >= self.most:
                return None
            self._running[user] += 1
        return functools.cache(functools.partial(self._end, user))

    def _end(self, user: int) -> None:
        with self._lock:
            self._running[user] -= 1
            if not self._running[user]:
                del self._running[user]


downloads = Downloads()
