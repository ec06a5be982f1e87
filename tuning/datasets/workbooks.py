"""An Excel workbook as JSON lines: line N holds row N of one sheet, so that every finding names the
row people see. No Django.

openpyxl trusts what it opens, so the whole workbook is measured first: its bytes against the
upload's budget, its elements (each costs far more than its bytes), and no document type, whose
entities could grow without an end.
"""

from __future__ import annotations

import datetime
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from tuning.datasets.findings import DatasetRejected, problem, rejected

_CHUNK = 1 << 18
_MOST_ELEMENTS = 10_000_000  # XML tags of all parts; a cell of text takes eight
_MOST_ROWS, _MOST_COLUMNS = 1_048_576, 1024  # Excel's own limit; a table of examples has few


def rows_of_workbook(
    file: IO[bytes],
    archive: zipfile.ZipFile,
    spend: Callable[[int], None],
    notes: list[dict[str, Any]],
    sheet: str = "",
) -> IO[bytes]:
    """The rows below the names in the first row that has any, as an anonymous temporary file.

    `sheet`: "" is the first visible one. What else the workbook has is noted. Raises
    DatasetRejected.
    """
    _measure(archive, spend)
    try:
        # 20 ms to import, and most uploads are no workbooks
        from openpyxl import load_workbook

        file.seek(0)
        book = load_workbook(file, read_only=True, data_only=True, keep_links=False)
        chosen = _chosen(book.worksheets, sheet, notes)
        chosen.reset_dimensions()  # what the file says of its size need not be true
        return _written(_without_title(chosen.iter_rows(values_only=True), notes), spend)
    except DatasetRejected:
        raise
    except Exception as fault:  # a damaged part shows itself in whatever way openpyxl trips on it
        detail = f"{type(fault).__name__}: {fault}"[:200]
        raise DatasetRejected([problem("archive_damaged", detail=detail)]) from fault


def _measure(archive: zipfile.ZipFile, spend: Callable[[int], None]) -> None:
    elements = 0
    for member in archive.infolist():
        if member.flag_bits & 1:
            raise rejected("archive_encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise rejected("archive_damaged", detail="compression method")
        with archive.open(member) as part:
            tail = b""
            while data := part.read(_CHUNK):
                spend(len(data))
                if not member.filename.lower().endswith((".xml", ".rels")):
                    continue
                elements += data.count(b"<")
                # UTF-16, in which a document type could hide, has zeros
                if b"<!DOCTYPE" in tail + data or b"\0" in data[:64]:
                    raise rejected("archive_damaged", detail="document type or encoding")
                if elements > _MOST_ELEMENTS:
                    raise rejected("workbook_too_large", rows=_MOST_ELEMENTS // 20)
                tail = data[-8:]


def _chosen(sheets: list, wanted: str, notes: list[dict[str, Any]]):
    visible = [sheet for sheet in sheets if sheet.sheet_state == "visible"] or sheets
    names = ", ".join(sheet.title for sheet in sheets)[:300]
    found = [sheet for sheet in sheets if sheet.title.strip() == wanted.strip()]
    if wanted.strip() and not found:
        raise rejected("no_sheet", sheet=wanted[:100], sheets=names)
    chosen = (found or visible)[0]
    others = [sheet.title for sheet in sheets if sheet is not chosen]
    if others:
        told = {"sheet": chosen.title, "others": ", ".join(others)[:300]}
        notes.append(problem("other_sheets", level="warning", **told))
    return chosen


def _without_title(rows: Iterable[tuple], notes: list[dict[str, Any]]) -> Iterator[tuple]:
    """The rows, an empty one in place of a title: one cell above the names of several columns."""
    rows = iter(rows)
    held: list[tuple] = []  # up to the second row that has a cell
    filled = 0
    for row in rows:
        held.append(row)
        filled += any(cell is not None for cell in row)
        if filled == 2 or len(held) > 50:
            break
    titles = [number for number, row in enumerate(held) if sum(c is not None for c in row) == 1]
    names = [cell for cell in held[-1] if cell is not None] if held else []
    if filled == 2 and titles[:1] and len(names) > 1 and all(isinstance(n, str) for n in names):
        title = next(str(cell) for cell in held[titles[0]] if cell is not None)
        notes.append(problem("title_row", titles[0] + 1, level="warning", title=title[:80]))
        held[titles[0]] = ()
    yield from held
    yield from rows


def _written(rows, spend: Callable[[int], None]) -> IO[bytes]:
    out = tempfile.TemporaryFile()  # noqa: SIM115, closed with its Source
    names: list[str] = []
    written = 0
    for number, row in enumerate(rows, 1):
        if number > _MOST_ROWS or len(row) > _MOST_COLUMNS:
            raise rejected("archive_damaged", detail=f"row {number} with {len(row)} columns")
        if any(cell is not None for cell in row):
            line = b"\n"
            cells = [_text(cell) for cell in row]
            if names:
                cells += [None] * (len(names) - len(cells))
                named = {name: cell for name, cell in zip(names, cells, strict=False) if name}
                line = json.dumps(named, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
            else:
                names = [str(cell or "").strip() for cell in cells]
                twice = sorted({name for name in names if name and names.count(name) > 1})
                if twice:
                    found = problem("column_twice", number, column=", ".join(twice)[:100])
                    raise DatasetRejected([found])
            line = b"\n" * (number - 1 - written) + line
            written = number
            spend(len(line))
            out.write(line)
    return out


def _text(cell: Any) -> str | None:
    """A cell as its reader sees it; None where it is empty."""
    if cell is None or isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return "TRUE" if cell else "FALSE"
    if isinstance(cell, datetime.datetime):
        midnight = cell.time() == datetime.time()
        return cell.date().isoformat() if midnight else cell.isoformat(sep=" ")
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell)
