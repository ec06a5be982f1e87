"""What a checkpoint will take in memory, estimated from its description: for chat, for P-tuning and
for full fine-tuning, at each precision, every figure with its arithmetic. No torch.

Estimates are of what must be held at once, not of peaks in between. What a load really took
(`measured` in the description, written by the worker) takes the place of weights and program.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

# bytes a parameter takes when it is held in this precision
PRECISIONS: dict[str, float] = {"float32": 4, "bfloat16": 2, "int8": 1.05, "int4": 0.56}
PROGRAM = 400 << 20  # bytes: Python, torch and its libraries, measured on a CPU
TOKENS = 8192  # of one conversation, unless the context is shorter
EXAMPLE = 512  # tokens of one training example, prompt and response
PREFIX = 128  # tokens of a prefix
ADAM = 8  # bytes a trained parameter takes for the optimiser's two moments in float32


@dataclass(frozen=True)
class Term:
    """One summand. `name`: weights | cache | program | gradients | optimiser | activations |
    prefix | measured (weights and program as a load really took them). `arithmetic`: the factors as
    text, the same in every language.
    """

    name: str
    bytes: int
    arithmetic: str


@dataclass(frozen=True)
class Estimate:
    """`use`: chat | ptuning | full. `fits`: whether this machine has so much in all."""

    use: str
    precision: str
    terms: tuple[Term, ...]
    available: int

    @property
    def bytes(self) -> int:
        return sum(term.bytes for term in self.terms)

    @property
    def fits(self) -> bool:
        return self.bytes <= self.available

    def as_dict(self) -> dict[str, Any]:
        terms = [vars(term) for term in self.terms]
        known = {"use": self.use, "precision": self.precision}
        return {**known, "bytes": self.bytes, "fits": self.fits, "terms": terms}


@dataclass(frozen=True)
class Machine:
    """`device`: "cuda" or "cpu"; `bytes`: all the memory that models may lie in there."""

    device: str
    bytes: int


@lru_cache
def machine() -> Machine:
    """This machine: its graphics cards together where there are any, else its main memory within
    the container's limit.
    """
    cards = _cards()
    if cards:
        return Machine("cuda", cards)
    total = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or no limit ("max")
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return Machine("cpu", total)


def _cards() -> int:
    argv = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True).stdout
        return sum(int(line) for line in told.split()) << 20
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def estimates(description: Mapping[str, Any], here: Machine | None = None) -> list[Estimate]:
    """Every use at every precision that it has; [] when the description says too little."""
    here = here or machine()
    shape = _shape(description)
    if shape is None:
        return []
    chat = [_chat(shape, precision, here) for precision in PRECISIONS]
    tuning = [_ptuning(shape, precision, here) for precision in PRECISIONS]
    measured = description.get("measured") or {}
    if measured.get("device") == here.device:
        chat = [_corrected(one, measured) for one in chat]
        tuning = [_corrected(one, measured) for one in tuning]
    return [*chat, *tuning, *(_full(shape, name, here) for name in ("float32", "bfloat16"))]


def ptuning(
    description: Mapping[str, Any], precision: str, length: int, tokens: int
) -> Estimate | None:
    """Of one run: a prefix of so many tokens, learnt from so many tokens at once. None where the
    description says too little.
    """
    shape, here = _shape(description), machine()
    if shape is None:
        return None
    estimate = _ptuning(shape, precision, here, length, tokens)
    measured = description.get("measured") or {}
    return _corrected(estimate, measured) if measured.get("device") == here.device else estimate


def full(description: Mapping[str, Any], precision: str) -> Estimate | None:
    """Of full fine-tuning that computes in float32 or bfloat16; None where the description says too
    little.
    """
    shape = _shape(description)
    return None if shape is None else _full(shape, precision, machine())


def held_as(description: Mapping[str, Any], device: str, bits: int | None = None) -> str:
    """The precision that its weights have in memory on such a device."""
    if bits in (4, 8):
        return f"int{bits}"
    stored = str(description.get("dtype"))
    return "float32" if device.startswith("cpu") or stored == "float32" else "bfloat16"


@dataclass(frozen=True)
class _Shape:
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int

    @property
    def cache_numbers(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def cache_text(self) -> str:
        return f"2 × {self.layers} × {self.kv_heads} × {self.head_dim}"


def _shape(description: Mapping[str, Any]) -> _Shape | None:
    names = ("parameters", "layers", "hidden_size", "kv_heads", "head_dim", "vocabulary")
    values = {name: description.get(name) for name in names}
    if not all(isinstance(value, int) and 0 < value < 1 << 60 for value in values.values()):
        return None
    # packed weights are counted as stored: what they stand for is not known then
    if description.get("quantization_bit"):
        return None
    hidden = int(values["hidden_size"] or 0)
    intermediate, context = description.get("intermediate_size"), description.get("context_length")
    return _Shape(
        parameters=int(values["parameters"] or 0),
        layers=int(values["layers"] or 0),
        hidden=hidden,
        intermediate=intermediate if isinstance(intermediate, int) else 4 * hidden,
        kv_heads=int(values["kv_heads"] or 0),
        head_dim=int(values["head_dim"] or 0),
        vocabulary=int(values["vocabulary"] or 0),
        context=context if isinstance(context, int) else TOKENS,
    )


def _program() -> Term:
    return Term("program", PROGRAM, "")


def _weights(shape: _Shape, width: float) -> Term:
    return Term("weights", int(shape.parameters * width), f"{shape.parameters:,} × {width:g} B")


def _held(precision: str) -> float:
    """Numbers that are computed with: packed weights are unpacked to two bytes."""
    return max(2, PRECISIONS[precision])


def _chat(shape: _Shape, precision: str, here: Machine) -> Estimate:
    tokens, width = min(TOKENS, shape.context), _held(precision)
    cache = Term(
        "cache",
        int(shape.cache_numbers * width * tokens),
        f"{shape.cache_text} × {width:g} B × {tokens:,}",
    )
    terms = (_weights(shape, PRECISIONS[precision]), cache, _program())
    return Estimate("chat", precision, terms, here.bytes)


def _corrected(estimate: Estimate, measured: Mapping[str, Any]) -> Estimate:
    """With what a load in this precision really took, in place of weights and program."""
    if estimate.precision != measured.get("precision"):
        return estimate
    rest = tuple(term for term in estimate.terms if term.name not in ("weights", "program"))
    term = Term("measured", int(measured["bytes"]), "")
    return replace(estimate, terms=(term, *rest))


def _activations(shape: _Shape, width: float, tokens: int) -> Term:
    """What the way back needs of so many tokens: about ten vectors and three of the feed-forward
    layer per token and layer, and the logits with their gradient in float32.
    """
    numbers = tokens * shape.layers * (10 * shape.hidden + 3 * shape.intermediate)
    logits = 2 * tokens * shape.vocabulary
    text = (
        f"{tokens:,} × ({shape.layers} × (10 × {shape.hidden:,} + 3 × {shape.intermediate:,}) × "
        f"{width:g} B + 2 × {shape.vocabulary:,} × 4 B)"
    )
    return Term("activations", int(numbers * width + logits * 4), text)


def _ptuning(
    shape: _Shape, precision: str, here: Machine, length: int = PREFIX, tokens: int = 0
) -> Estimate:
    """tokens: of the examples that are computed at once; 0: one of EXAMPLE."""
    trained = length * shape.cache_numbers
    prefix = Term("prefix", trained * (8 + ADAM), f"{length} × {shape.cache_text} × {8 + ADAM} B")
    terms = (
        _weights(shape, PRECISIONS[precision]),
        prefix,
        _activations(shape, _held(precision), tokens or min(EXAMPLE, shape.context)),
        _program(),
    )
    return Estimate("ptuning", precision, terms, here.bytes)


def sweep(
    description: Mapping[str, Any],
    precision: str,
    prefix_lengths: Sequence[int],
    longest: int,
    here: Machine | None = None,
) -> Estimate | None:
    """Several prefixes that learn at once, on examples of at most `longest` tokens; None when the
    description says too little. Besides what one prefix needs, each keeps its best step and a copy
    in the batch.
    """
    shape = _shape(description)
    if shape is None:
        return None
    tokens, each = sum(prefix_lengths), 16 + ADAM
    prefixes = Term(
        "prefix",
        tokens * shape.cache_numbers * each,
        f"({' + '.join(map(str, prefix_lengths))}) × {shape.cache_text} × {each} B",
    )
    activations = _activations(shape, _held(precision), min(longest, shape.context))
    terms = (_weights(shape, PRECISIONS[precision]), prefixes, activations, _program())
    return Estimate("ptuning", precision, terms, (here or machine()).bytes)


def _full(shape: _Shape, precision: str, here: Machine) -> Estimate:
    """Weights that learn, their gradients and Adam's moments are float32 whatever is computed in;
    a forward in half precision has a copy of the weights besides.
    """
    width = PRECISIONS[precision]
    count, copy = f"{shape.parameters:,}", width if width < 4 else 0
    weights = f"{count} × (4 + {copy:g}) B" if copy else f"{count} × 4 B"
    terms = (
        Term("weights", int(shape.parameters * (4 + copy)), weights),
        Term("gradients", shape.parameters * 4, f"{count} × 4 B"),
        Term("optimiser", shape.parameters * ADAM, f"{count} × {ADAM} B"),
        _activations(shape, width, min(EXAMPLE, shape.context)),
        _program(),
    )
    return Estimate("full", precision, terms, here.bytes)
