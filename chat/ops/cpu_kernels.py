"""cpu_kernels.cpp, compiled for the processor at hand and called through ctypes.

Needs a C++ compiler (CXX, or g++ or clang++ on the PATH) when it is first used, for about two
seconds; the library is kept in the user's cache folder. Without one `load` returns None, and what
would have used the kernels goes through torch instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
TEMPORARY = "portal-kernels-"  # folders, where the user has no cache folder that can be trusted
LARGEST_HEAD = 256  # floats; the kernels' buffers are made for it
TYPES = {torch.float32: "float", torch.bfloat16: "bfloat"}
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math")


class Forward(ctypes.Structure):
    """cpu_kernels.cpp says what the fields of this and of Layer are."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("tokens", "heads", "kv_heads", "dim", "threads")],
        *[(name, ctypes.c_void_p) for name in ("row", "column", "prefix_length", "prefix")],
        *[
            (name, ctypes.c_void_p)
            for name in ("cosine", "sine", "prefix_bias", "queries", "state")
        ],
        ("scale", ctypes.c_float),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("number", "row_stride", "head_stride")],
        *[(name, ctypes.c_void_p) for name in ("keys", "values", "query_weight", "key_weight")],
        ("epsilon", ctypes.c_float),
    ]


class Kernels:
    """The functions for one element type; addresses are `Tensor.data_ptr()` of contiguous
    tensors.
    """

    def __init__(self, library: ctypes.CDLL, name: str):
        whole, real, address = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
        self.normalise = library[f"normalise_{name}"]
        self.normalise.argtypes = (whole, whole, real, whole, *[address] * 4)
        self.gate = library[f"gate_{name}"]
        self.gate.argtypes = (whole, whole, whole, address, address)
        self.attend = library[f"attend_{name}"]
        self.attend.argtypes = (*[address] * 4,)
        for function in (self.normalise, self.gate, self.attend):
            function.restype = None


def load(dtype: torch.dtype) -> Kernels | None:
    """The kernels for one dtype; None where there are none for it, or no compiler."""
    library = _library() if dtype in TYPES else None
    return None if library is None else Kernels(library, TYPES[dtype])


@cache
def _library() -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        log.info("no C++ compiler: decoding without kernels of our own")
        return None
    try:
        target = _place(compiler)
        if not target.is_file():
            _compile(compiler, target)
        library = ctypes.CDLL(str(target))
        if target.parent.name.startswith(TEMPORARY):  # it stays mapped
            shutil.rmtree(target.parent, ignore_errors=True)
        return library
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.warning("decoding without kernels of our own: %s", str(said).strip()[-500:])
        return None


def _place(compiler: str) -> Path:
    """Where the library is, or is to be: a file of this user's alone, named by what makes it."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    processor = platform.machine() + platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += "".join(line for line in lines[:40] if line.startswith(("flags", "Features")))
    parts = (SOURCE.read_text(), version, processor, *FLAGS, _openmp())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "model-portal"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = home.stat()
        own = found.st_uid == os.getuid() and not found.st_mode & 0o022
        if own and os.access(home, os.W_OK):
            return home / f"kernels-{name}.so"
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix=TEMPORARY)) / f"kernels-{name}.so"


def _compile(compiler: str, target: Path) -> None:
    """In two steps, so that the library uses the threads that torch has, and not a second set."""
    openmp = _openmp()
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        compiled, linked = Path(place) / "kernels.o", Path(place) / "kernels.so"
        parallel = "-fopenmp" if openmp else "-fopenmp-simd"
        for command in (
            [compiler, *FLAGS, native, parallel, "-c", str(SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked), *([openmp] if openmp else [])],
        ):
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        os.replace(linked, target)


def _openmp() -> str:
    """The OpenMP library that torch has loaded, "" if it is none that GCC's code can use."""
    maps = Path("/proc/self/maps")
    if maps.is_file():
        for line in maps.read_text().splitlines():
            if "/libgomp" in line or "/libiomp5" in line:
                return line.split(maxsplit=5)[-1]
    return ""
