"""A dataset's rows changed: fixed, left out, added, merged with another's. Each change is a new
version; the one before stays what it was, for the runs that read it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from tuning.datasets.files import Split
from tuning.datasets.rows import BadRow, canonical
from tuning.datasets.store import TRAIN, new_version, opened
from tuning.models import Dataset, DatasetVersion

MOST_ADDED = 1000  # rows of one call
_FAULTS = {"empty_prompt": "prompt", "empty_response": "response"}  # code -> field


def line_of(prompt: Any, response: Any, history: Any = ()) -> bytes:
    """The canonical line of a row that somebody has written. ValidationError({field: ...})."""
    problems = {}
    for name, text in (("prompt", prompt), ("response", response)):
        if not isinstance(text, str):
            problems[name] = ValidationError(_("Must be a text."), "invalid")
    history = list(history or ())
    pairs = all(
        isinstance(turn, (list, tuple))
        and len(turn) == 2
        and all(isinstance(text, str) for text in turn)
        for turn in history
    )
    if not pairs:
        message = _("A list of [question, answer] pairs.")
        problems["history"] = ValidationError(message, "bad_history")
    if problems:
        raise ValidationError(problems)
    try:
        return canonical(prompt, response, [list(turn) for turn in history])
    except BadRow as bad:
        if bad.code in _FAULTS:
            message = _("This must not be empty.")
        else:
            message = _("The text contains a NUL or half a character.")
        field = _FAULTS.get(bad.code, "response")
        raise ValidationError({field: ValidationError(message, bad.code)}) from bad


def change_rows(
    dataset: Dataset,
    split: str = TRAIN,
    *,
    base: DatasetVersion | None,
    replaced: Mapping[int, bytes] | None = None,
    excluded: Iterable[int] = (),
    added: Sequence[bytes] = (),
    action: str = "edit",
) -> DatasetVersion:
    """A new version whose `split` has other rows: `replaced` by line (from 1), without those
    `excluded`, with those `added` at its end (each a line as `line_of` makes it).

    `base`: the version that was looked at. Raises ValidationError: a line that is not there,
    nothing to change, `base` not the newest any more, files gone.
    """
    replaced, out = dict(replaced or {}), set(excluded)
    count = base.splits.get(split, {}).get("rows", 0) if base else 0
    beyond = sorted(line for line in out | replaced.keys() if not 1 <= line <= count)
    if beyond:
        message = _("There is no line %(line)s; the split has %(rows)s rows.")
        raise ValidationError(message % {"line": beyond[0], "rows": count}, "no_such_line")
    if not (replaced or out or added):
        raise ValidationError(_("There is nothing to change."), "no_change")
    change = {
        "action": action,
        "split": split,
        "changed": len(replaced.keys() - out),
        "excluded": len(out),
        "added": len(added),
    }
    if not count:
        return new_version(dataset, {split: added}, base=base, change=change)
    assert base is not None
    with opened(base, split) as rows:
        kept = (
            replaced.get(row + 1) or rows.raw(row) for row in range(len(rows)) if row + 1 not in out
        )
        return new_version(dataset, {split: chain(kept, added)}, base=base, change=change)


def merge(dataset: Dataset, other: Dataset) -> DatasetVersion:
    """A new version with the rows of another dataset's newest behind its own, split by split. Rows
    that are here already, word for word, do not come again.
    """
    base, theirs = dataset.current, other.current
    if theirs is None or other.pk == dataset.pk:
        raise ValidationError({"other": ValidationError(_("Choose another dataset."), "invalid")})
    parts: dict[str, Iterable[bytes]] = {}
    counts = Counter[str]()

    def together(mine: Split | None, more: Split) -> Iterator[bytes]:
        seen = set()
        for row in range(len(mine) if mine else 0):
            assert mine is not None
            line = mine.raw(row)
            seen.add(hash(line))
            yield line
        for row in range(len(more)):
            line = more.raw(row)
            if hash(line) in seen:
                counts["repeated"] += 1
            else:
                seen.add(hash(line))
                counts["added"] += 1
                yield line

    for split in theirs.splits:
        mine = opened(base, split) if base and split in base.splits else None
        parts[split] = list(together(mine, opened(theirs, split)))
    if not counts["added"]:
        message = _("All its rows are here already.")
        raise ValidationError({"other": ValidationError(message, "no_change")})
    change = {
        "action": "merge",
        "other": {"id": other.pk, "name": other.name, "version": theirs.number},
        "added": counts["added"],
        "repeated": counts["repeated"],
    }
    return new_version(dataset, parts, base=base, change=change)


def difference(
    old: DatasetVersion, new: DatasetVersion, split: str = TRAIN
) -> list[dict[str, Any]]:
    """What distinguishes a split of two versions, in the order of its lines: [{"kind": "changed" |
    "removed" | "added", "line" (of the old; of the new for what was added), "before", "after"}];
    before and after: rows, or None. A row that stands in both is none, wherever it stands.
    """
    mine, theirs = (
        opened(version, split) if split in version.splits else None for version in (old, new)
    )
    gone, come = _only(mine, theirs), _only(theirs, mine)
    # A row that was changed keeps its place among those that stay, and one of its texts.
    left = dict(gone)
    found: list[dict[str, Any]] = []
    for place, line in come:
        after, at = _row(theirs, line), left.get(place)
        before = None if at is None else _row(mine, at)
        if before is not None and any(
            before[part] == after[part] for part in ("prompt", "response")
        ):
            del left[place]
            assert at is not None
            found.append({"kind": "changed", "line": at + 1, "before": before, "after": after})
        else:
            found.append({"kind": "added", "line": line + 1, "before": None, "after": after})
    found += [
        {"kind": "removed", "line": line + 1, "before": _row(mine, line), "after": None}
        for line in left.values()
    ]
    return sorted(found, key=lambda entry: (entry["line"], entry["kind"]))


def _row(rows: Split | None, number: int) -> dict[str, Any]:
    assert rows is not None
    return rows[number]


def _only(rows: Split | None, others: Split | None) -> list[tuple[tuple[int, int], int]]:
    """(place, row number) of the rows that `others` lacks; the place is the number of common rows
    before it and which one behind those it is.
    """
    if rows is None:
        return []
    left = Counter(hash(others.raw(row)) for row in range(len(others))) if others else Counter()
    found, common, behind = [], 0, 0
    for row in range(len(rows)):
        key = hash(rows.raw(row))
        if left[key]:
            left[key] -= 1
            common, behind = common + 1, 0
        else:
            found.append(((common, behind), row))
            behind += 1
    return found
