"""Weight files as tensors that are read when they are needed and leave no trace in memory afterwards."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_utils import load_state_dict

_PIECE_BYTES = 16 << 20
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_DONTNEED") else None


class MappedTensor:
    """A tensor in a mapped file that gives its pages back while it is converted.

    transformers' loader treats it as it treats a slice of a safetensors file: `tensor[...]`, once. Without it fp16 files
    widened to fp32 keep half the weights' size in mapped pages resident until the last tensor is read.
    """

    def __init__(self, source: Any, dtype: torch.dtype | None):
        """source: a mapped tensor or a slice of a safetensors file. dtype: of floating point tensors; None keeps theirs."""
        self._source, self._dtype = source, dtype

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self._source[index]
        if self._dtype in (None, tensor.dtype) or not tensor.is_floating_point() or not tensor.dim():
            return tensor  # stays mapped: it is the weight itself
        converted = torch.empty(tensor.shape, dtype=self._dtype)
        rows = max(1, _PIECE_BYTES * len(tensor) // max(1, tensor.nbytes))
        for source, target in zip(tensor.split(rows), converted.split(rows), strict=True):
            target.copy_(source)
            _give_back(source)
        return converted


def _give_back(tensor: Tensor) -> None:
    """Drop the whole pages that the tensor fills. They are unchanged copies of the file: a later access reads them again."""
    if _madvise is None or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_DONTNEED))


def streamed(files: Sequence[str], dtype: torch.dtype | None) -> dict[str, Any]:
    """name -> something that becomes the tensor at `[...]`, for all tensors of a checkpoint's files.

    Both kinds are mapped (.bin files that are no zip archive, from before torch 1.6, are read whole); .bin files are unpickled
    with weights_only.
    """
    state: dict[str, Any] = {}
    for file in files:
        if str(file).endswith(".safetensors"):
            mapped = safe_open(file, framework="pt")
            sources = {name: mapped.get_slice(name) for name in mapped.keys()}  # noqa: SIM118 - not a dict
        else:
            sources = load_state_dict(file)
        state |= {name: MappedTensor(source, dtype) for name, source in sources.items()}
    return state
