"""The header of a GGUF file: metadata and the table of tensors. Bounded in time and memory, no
torch.

Layout (little endian): "GGUF", version u32, tensor count u64, metadata count u64; then per entry a
key, a type and a value; then per tensor a name, its dimensions, its type and its offset.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chat.checkpoints.fetch.failures import FetchFailed

HEADER_BYTES = 256 << 20  # a vocabulary of 262,144 words takes about 6 MiB
_ENTRIES, _TENSORS, _STRING_BYTES = 4096, 200_000, 16 << 20
_FORMATS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class PackedTensor:
    """`shape` in torch's order; `type`: ggml's number of the packing; `start`: byte in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True)
class GgufHeader:
    metadata: dict[str, Any]
    tensors: tuple[PackedTensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def of_architecture(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_header(path: Path) -> GgufHeader:
    """FetchFailed("gguf_damaged") for what is no whole GGUF header of version 2 or 3."""
    try:
        with path.open("rb") as file, _mapped(file) as content:
            return _Reader(content).header()
    except (struct.error, ValueError, OverflowError, OSError, KeyError, MemoryError) as error:
        raise FetchFailed(
            "gguf_damaged",
            f"{path.name} cannot be read as GGUF: {error}",
            file=path.name,
            reason=str(error) or type(error).__name__,
        ) from error


def _mapped(file: Any) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class _Reader:
    def __init__(self, content: mmap.mmap):
        self._content, self._at = content, 0
        self._most = min(len(content), HEADER_BYTES)

    def header(self) -> GgufHeader:
        if self._content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version, tensors, entries = self._take("IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not known")
        if entries > _ENTRIES or tensors > _TENSORS:
            raise ValueError("its header counts more than a model has")
        metadata = {}
        for _ in range(entries):
            key = self._string()
            metadata[key] = self._value(self._take("I")[0])
        table = [self._tensor() for _ in range(tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        if not 0 < alignment <= 1 << 20:
            raise ValueError("its alignment makes no sense")
        data = -(-self._at // alignment) * alignment
        if any(tensor.start + data > len(self._content) for tensor in table):
            raise ValueError("it has been cut off")
        found = tuple(replace(tensor, start=data + tensor.start) for tensor in table)
        return GgufHeader(metadata, found)

    def _take(self, form: str, count: int = 1) -> tuple[Any, ...]:
        form = f"<{form}" if count == 1 else f"<{count}{form}"
        end = self._at + struct.calcsize(form)
        if end > self._most:
            raise ValueError("its header does not end")
        values = struct.unpack_from(form, self._content, self._at)
        self._at = end
        return values

    def _string(self) -> str:
        (length,) = self._take("Q")
        if length > _STRING_BYTES or self._at + length > self._most:
            raise ValueError("a text in its header does not end")
        text = self._content[self._at : self._at + length]
        self._at += length
        return text.decode("utf-8", "surrogateescape")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._take(_FORMATS[kind])[0]
        element, count = self._take("IQ")
        if element == _STRING:
            if count * 8 > self._most:
                raise ValueError("a list in its header does not end")
            return [self._string() for _ in range(count)]
        if count * struct.calcsize(_FORMATS[element]) > self._most:
            raise ValueError("a list in its header does not end")
        return list(self._take(_FORMATS[element], count)) if count else []

    def _tensor(self) -> PackedTensor:
        """Its start is counted from the data's, which is not known yet."""
        name = self._string()
        (dimensions,) = self._take("I")
        if not 0 < dimensions <= 4:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = self._take("Q", dimensions)
        kind, offset = self._take("IQ")
        return PackedTensor(name, tuple(reversed(shape)), kind, offset)
