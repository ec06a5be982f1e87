"""A split as a file to take away: JSON lines, one JSON array, or CSV for a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import AsyncIterator
from typing import Any

from asgiref.sync import sync_to_async
from django.http import StreamingHttpResponse

from portal.text import safe_cell
from tuning.datasets.store import examples, opened
from tuning.models import DatasetVersion

TYPES = {
    "jsonl": "application/jsonl",
    "json": "application/json",
    "csv": "text/csv; charset=utf-8",
}
_AT_ONCE = 1000  # rows


def columns_of(version: DatasetVersion) -> tuple[str, str, str]:
    """What prompt, response and history are called in an export: as in the upload, where that had
    a column for each.
    """
    dataset = version.dataset
    if dataset.prompt_column == dataset.response_column:  # a whole conversation in one
        return "prompt", "response", "history"
    return dataset.prompt_column, dataset.response_column, dataset.history_column or "history"


def response(version: DatasetVersion, split: str, form: str) -> StreamingHttpResponse:
    """The split as a download. form: a key of TYPES. ValidationError when the files are gone."""
    with opened(version, split) as rows:
        has_history = rows.has_history()
    names: tuple[str, ...] = columns_of(version)
    names = names if has_history else names[:2]
    answer = StreamingHttpResponse(_pieces(version, split, form, names), content_type=TYPES[form])
    # Django quotes no name of ours: the dataset's may hold anything
    answer["Content-Disposition"] = (
        f'attachment; filename="dataset-{version.dataset_id}-v{version.number}-{split}.{form}"'
    )
    return answer


async def _pieces(
    version: DatasetVersion, split: str, form: str, names: tuple[str, ...]
) -> AsyncIterator[str]:
    read = sync_to_async(examples)
    write = {"csv": _as_csv, "json": _as_array, "jsonl": _as_lines}[form]
    count = version.splits[split]["rows"]
    yield {"csv": "\ufeff" + _csv_line(names), "json": "[\n", "jsonl": ""}[form]
    for start in range(0, count, _AT_ONCE):
        rows = await read(version, split, start, _AT_ONCE)
        yield write([_named(row, names) for row in rows], start + len(rows) >= count)
    yield "]\n" if form == "json" else ""


def _named(row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return dict(zip(names, (row["prompt"], row["response"], row["history"]), strict=False))


def _dumped(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False)


def _as_lines(rows: list[dict], last: bool) -> str:
    return "".join(_dumped(row) + "\n" for row in rows)


def _as_array(rows: list[dict], last: bool) -> str:
    return ",\n".join(map(_dumped, rows)) + ("\n" if last else ",\n")


def _as_csv(rows: list[dict], last: bool) -> str:
    return "".join(
        _csv_line(
            safe_cell(cell) if isinstance(cell, str) else _dumped(cell) if cell else ""
            for cell in row.values()
        )
        for row in rows
    )


def _csv_line(cells) -> str:
    out = io.StringIO()
    csv.writer(out).writerow(cells)
    return out.getvalue()
