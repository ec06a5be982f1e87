"""Weight files as tensors that are read when they are needed and leave no trace in memory
afterwards.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import load_state_dict

_PIECE_BYTES = 4 << 20
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_DONTNEED") else None


class MappedTensor:
    """A tensor in a mapped file that gives its pages back while it is converted.

    transformers' loader treats it as it treats a slice of a safetensors file: `tensor[...]`, once.
    Without it fp16 files widened to fp32 keep half the weights' size in mapped pages resident until
    the last tensor is read.
    """

    def __init__(self, source: Any, dtype: torch.dtype | None, copies: bool):
        """source: a mapped tensor or a slice of a safetensors file. dtype: of floating point
        tensors; None keeps theirs. copies: whether a tensor that needs no conversion leaves the
        file too, because it is not the weight itself.
        """
        self._source, self._dtype, self._copies = source, dtype, copies

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self._source[index]
        dtype = (
            self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
        )
        if not tensor.dim() or (dtype == tensor.dtype and not self._copies):
            return tensor  # stays mapped: it is the weight itself
        converted = fresh(tensor.shape, dtype)
        rows = max(1, _PIECE_BYTES * len(tensor) // max(1, tensor.nbytes))
        for source, target in zip(tensor.split(rows), converted.split(rows), strict=True):
            target.copy_(source)
            _give_back(source)
        return converted


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """An uninitialised tensor; on a CPU in pages of its own, which the system has back the moment
    it is freed.

    Below 32 MB glibc keeps what is freed, and before 2.38 it seldom finds a use for an aligned
    piece again: what loading and packing need for a moment between weights that stay would add up
    to the plain model's size.
    """
    if device is not None and device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    pages = mmap.mmap(
        -1, max(1, count) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    return (
        torch.frombuffer(pages, dtype=dtype, count=count).view(shape)
        if count
        else torch.empty(shape, dtype=dtype)
    )


def _give_back(tensor: Tensor) -> None:
    """Drop the whole pages that the tensor fills. They are unchanged copies of the file: a later
    access reads them again.
    """
    if _madvise is None or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_DONTNEED)
        )


def streamed(
    files: Sequence[str], dtype: torch.dtype | None, copies: bool = False
) -> dict[str, Any]:
    """name -> `MappedTensor`, for all tensors of a checkpoint's files.

    Both kinds are mapped (.bin files that are no zip archive, from before torch 1.6, are read
    whole); .bin files are unpickled with weights_only. Raises OSError, naming the file, when one is
    damaged or holds more than tensors.
    """
    state: dict[str, Any] = {}
    for file in files:
        try:
            if str(file).endswith(".safetensors"):
                mapped = safe_open(file, framework="pt")
                sources = {name: mapped.get_slice(name) for name in mapped.keys()}  # noqa: SIM118 - not a dict
            else:
                sources = load_state_dict(file)
        except pickle.UnpicklingError as error:
            # its own text advises to run whatever the file says
            raise OSError(f"{file} is not a file of tensors alone, so it is not read") from error
        except (EOFError, RuntimeError, SafetensorError) as error:
            raise OSError(
                f"{file} is damaged, perhaps its download was cut short: {error}"
            ) from error
        state |= {name: MappedTensor(source, dtype, copies) for name, source in sources.items()}
    return state
