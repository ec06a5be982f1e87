"""The lines of a batch: read, checked all at once, and written. A line that is written is done: it
is one `write` with its line end, and a torn last one is cut off by whoever goes on.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from portal.rest.json_bodies import json_of

MOST_LINES = 50_000  # as OpenAI's
MOST_PROBLEMS = 20  # told of one file
LONGEST_ID = 200


def numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each that is not empty, from 1."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def problems_of(path: Path, endpoint: str) -> tuple[list[dict], int]:
    """What is wrong with an input file, [{"code", "message", "param", "line"}], and its lines."""
    found: list[dict] = []
    seen: set[str] = set()
    count = 0

    def problem(line: int | None, code: str, message: str, param: str | None = None) -> None:
        found.append({"code": code, "message": message, "param": param, "line": line})

    for number, text in numbered(path):
        count += 1
        if count > MOST_LINES:
            problem(None, "too_many_tasks", f"At most {MOST_LINES:,} lines are possible.")
            break
        if len(found) >= MOST_PROBLEMS:
            break
        try:
            line = json_of(text)
        except ValueError:
            problem(number, "invalid_json_line", "The line is not a JSON object in UTF-8.")
            continue
        line = line if isinstance(line, dict) else {}
        id = line.get("custom_id")
        if not isinstance(id, str) or not 0 < len(id) <= LONGEST_ID:
            problem(number, "invalid_custom_id", "custom_id must be a text.", "custom_id")
        elif id in seen:
            problem(number, "duplicate_custom_id", f"{id} was there before.", "custom_id")
        else:
            seen.add(id)
        if line.get("method") != "POST":
            problem(number, "invalid_method", "The method is POST.", "method")
        if line.get("url") != endpoint:
            problem(number, "mismatched_endpoint", f"The batch is for {endpoint}.", "url")
        if not isinstance(line.get("body"), dict):
            problem(number, "invalid_request", "body must be an object.", "body")
    if not count:
        problem(None, "empty_file", "The file has no lines.")
    return found, count


class Written:
    """One file of finished lines, gone on with after however it was left."""

    def __init__(self, path: Path):
        self.ids: set[str] = set()
        whole = 0
        if path.exists():
            with open(path, "rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    whole += len(line)
                    self.ids.add(json_of(line)["custom_id"])
        self._file = open(path, "ab")  # noqa: SIM115  kept open
        self._file.truncate(whole)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, custom_id: str, text: str) -> None:
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.ids.add(custom_id)

    def close(self) -> None:
        self._file.close()


def result(custom_id: str, status: int, body: Any) -> dict:
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": uuid.uuid4().hex, "body": body},
        "error": None,
    }


def unanswered(custom_id: str, code: str, message: str) -> dict:
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }
