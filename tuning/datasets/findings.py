"""What is wrong with an upload, told once for each kind of problem. No Django;
tuning/datasets/messages.py words it.
"""

from __future__ import annotations

from typing import Any

KEPT_LINES = 1000  # line numbers kept of a kind; also the errors after which a hopeless file ends


class DatasetRejected(Exception):
    """Nothing was stored. `problems`: one entry a kind (see `problem`), errors first; `total`
    counts every row that has one.
    """

    def __init__(self, problems: list[dict[str, Any]], total: int | None = None):
        super().__init__(
            f"{problems[0]['code']} at line {problems[0]['line']}" if problems else "rejected"
        )
        self.problems, self.total = problems, len(problems) if total is None else total


def problem(
    code: str, line: int | None = None, *, level: str = "error", member: str = "", **params
) -> dict[str, Any]:
    """One finding: {"line" of the first (1-based; None: it concerns the whole file), "code",
    "level", "params", "count", "lines" (the first 1,000), "member"?}.
    """
    told = {
        name: printable(value) if isinstance(value, str) else value
        for name, value in params.items()
    }
    lines = [] if line is None else [line]
    found = {
        "line": line, "code": code, "level": level, "params": told, "count": 1, "lines": lines
    }  # fmt: skip
    if member:
        found["member"] = printable(member)
    return found


def printable(text: str) -> str:
    """Text from inside a file, fit for JSON, a page and the database: no half characters, no
    NUL.
    """
    return text.encode("utf-8", "replace").decode().replace("\0", "�")


def rejected(code: str, **params) -> DatasetRejected:
    return DatasetRejected([problem(code, **params)])


class Findings:
    """All problems of one upload, those of a kind together: of one code, column and file."""

    def __init__(self) -> None:
        self._kinds: dict[tuple, dict[str, Any]] = {}
        self.errors = self.warnings = self.usable = 0
        self.member = ""

    @property
    def problems(self) -> list[dict[str, Any]]:
        """One entry a kind: errors first, else in the order in which they were met; that there is
        no row left comes behind its reasons.
        """
        return sorted(
            self._kinds.values(),
            key=lambda kind: (kind["code"] == "no_rows", kind["level"] != "error"),
        )

    @property
    def total(self) -> int:
        return self.errors + self.warnings

    def take(self, notes: list[dict[str, Any]]) -> None:
        """Warnings that were found before the rows were read."""
        for note in notes:
            self._kinds[note["code"], "warning", note.get("member"), len(self._kinds)] = note
            self.warnings += 1

    def add(self, code: str, line: int | None, *, level: str = "error", **params) -> None:
        if level == "error":
            self.errors += 1
        else:
            self.warnings += 1
        key = code, level, self.member, params.get("column")
        kind = self._kinds.get(key)
        if kind is None:
            self._kinds[key] = problem(code, line, level=level, member=self.member, **params)
        else:
            kind["count"] += 1
            if line is not None and len(kind["lines"]) < KEPT_LINES:
                kind["lines"].append(line)
        if not self.usable and self.errors >= KEPT_LINES:
            raise self.rejection()  # no sense in reading on

    def rejection(self) -> DatasetRejected:
        return DatasetRejected(self.problems, self.total)
