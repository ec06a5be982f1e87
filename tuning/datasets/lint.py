"""What is wrong with rows that are each well written: repeated, contradicting, leaking from the
validation split into training, damaged by an encoding. Pure.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rensa import RMinHash

from tuning.datasets.findings import Findings

REMEMBERED = 500_000  # rows that are compared with each other: about 100 MB
_HINTS = re.compile("[\ufffd\x80-\x9f锟烫锛銆鐨鏄鈥锘âãåèäæçÃÂ]")  # quick: most rows have none
# U+FFFD; control characters; two of what is left of common Chinese that was UTF-8 and read as GBK
# or as Windows-1252
_DAMAGE = re.compile(
    "[\ufffd\x80-\x9f]|锟斤拷|烫烫烫|[锛銆鐨鏄鈥锘].*[锛銆鐨鏄鈥锘]|"
    "[âãäåæçèéÃÂ][\xa1-\xbf€™œŸ…].*[âãäåæçèéÃÂ][\xa1-\xbf€™œŸ…]",
    re.DOTALL,
)

PERMUTATIONS, _BANDS, _SHINGLE = 64, 8, 4
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits without a pattern: 2**64 over the golden ratio
ALIKE = 0.85  # share of equal MinHash values from which on two rows are near duplicates


def is_damaged(text: str) -> bool:
    """Characters that a wrong encoding leaves behind: U+FFFD, control characters, mojibake."""
    if _HINTS.search(text) is None:
        return False
    if _DAMAGE.search(text):
        return True
    try:
        text.encode("cp1252").decode("utf-8")  # nothing but UTF-8 read as Windows-1252
    except UnicodeError:
        return False
    return True


class Lint:
    """Sees every row of an upload, the training split first, and adds warnings to `findings`."""

    def __init__(self, findings: Findings):
        self._findings = findings
        self._rows: dict[int, int] = {}  # hash of a row -> its line in training
        self._responses: dict[int, int] = {}  # hash of a prompt -> hash of its response
        self.training = True

    def see(self, line: int, canonical: bytes, prompt: str, history: list, response: str) -> None:
        row = hash(canonical)
        asked = hash((prompt, *map(tuple, history))) if history else hash(prompt)
        if not self.training:
            if row in self._rows or asked in self._responses:
                self._warn("seen_in_training", line)
        elif (first := self._rows.get(row)) is not None:
            self._warn("duplicate_row", line, first=first)
        elif len(self._rows) < REMEMBERED:
            self._rows[row] = line
            answered = hash(response)
            if self._responses.setdefault(asked, answered) != answered:
                self._warn("conflicting_response", line)
        elif len(self._rows) == REMEMBERED:
            self._rows[row] = line  # tells once
            self._warn("not_compared", line, rows=REMEMBERED)
        if is_damaged(prompt) or is_damaged(response):
            self._warn("damaged_text", line)

    def _warn(self, code: str, line: int, **params) -> None:
        self._findings.add(code, line, level="warning", **params)


def sketches(texts: Sequence[str]) -> list[bytes]:
    """The MinHash of each text's runs of four characters, as PERMUTATIONS 32-bit integers."""
    if not texts:
        return []
    padded = [text.ljust(_SHINGLE, "\0") for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), "<u4")
    ends = np.cumsum([len(text) for text in padded])
    hashes = np.zeros(max(0, len(codes) - _SHINGLE + 1), np.uint64)
    for at in range(_SHINGLE):  # of every run in one go, those from one text into the next as well
        hashes = hashes * _MIX + codes[at : at + len(hashes)]
    hashes = (hashes ^ (hashes >> np.uint64(31))) * _MIX
    within = np.ones(len(hashes), bool)
    for back in range(1, _SHINGLE):
        within[ends[:-1] - back] = False
    counts = [len(text) - _SHINGLE + 1 for text in padded]
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.uint64)
    found = RMinHash.digest_matrix_from_flat_token_hashes(hashes[within], starts, PERMUTATIONS, 1)
    return [array("I", digest).tobytes() for digest in found.to_rows()]


def near_duplicates(found: Sequence[bytes]) -> list[tuple[int, int]]:
    """(row, earlier row that it is nearly equal to), from the rows' sketches; each row once."""
    size = len(found[0]) // _BANDS if found else 0
    earlier: dict[int, int] = {}
    for band in range(_BANDS):
        seen: dict[bytes, int] = {}
        for row, sketch in enumerate(found):
            first = seen.setdefault(sketch[band * size : (band + 1) * size], row)
            if first != row and row not in earlier and _alike(sketch, found[first]) >= ALIKE:
                earlier[row] = first
    return sorted(earlier.items())


def _alike(one: bytes, other: bytes) -> float:
    """The share of equal values, which estimates the share of equal shingles."""
    pairs = zip(memoryview(one).cast("I"), memoryview(other).cast("I"), strict=True)
    return sum(mine == theirs for mine, theirs in pairs) / PERMUTATIONS


def histogram(lengths: Iterable[int], bars: int = 12) -> Iterator[tuple[int, int, int]]:
    """(lowest, highest, rows) of each bar over lengths in tokens; equally wide, from 1."""
    counted = Counter(lengths)
    if not counted:
        return
    width = -(-max(counted) // bars)
    for low in range(1, max(counted) + 1, width):
        high = low + width - 1
        yield low, high, sum(counted[length] for length in range(low, high + 1))
