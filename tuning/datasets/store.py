"""An upload becomes an immutable, content-addressed dataset version that is read by row
(tuning/datasets/files.py: the files).

A row that is wrong (not JSON, a column missing, not text) rejects the upload with all problems
named, because a file that is silently half used trains another model than its owner thinks;
`skip_bad_rows` asks for the good rows alone. Rows whose prompt or response is empty are passed over
with a warning, as the original's training does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO, Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import Max
from django.utils import timezone
from django.utils.translation import gettext as _

from tuning.datasets.columns import suggest
from tuning.datasets.files import Split, Writer, files_locked, paths_of
from tuning.datasets.findings import DatasetRejected, Findings, printable, problem, rejected
from tuning.datasets.lint import Lint
from tuning.datasets.messages import MESSAGES, in_short, worded
from tuning.datasets.rows import Columns, examples_of, first_row
from tuning.datasets.sources import Limits, Source, as_text, open_sources, read_head
from tuning.models import CheckRun, Dataset, DatasetVersion

__all__ = [
    "MESSAGES",
    "DatasetRejected",
    "Split",
    "add_split",
    "delete",
    "detect_columns",
    "ensure_sample",
    "examples",
    "in_short",
    "ingest",
    "limits",
    "open_split",
    "worded",
]

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SAMPLE_NAME = "青禾衣橱"  # the made-up house in whose style the sample is written
_SPLIT_NAMES = {
    TRAIN: ("train", "training"),
    VALIDATION: ("dev", "valid", "validation", "val", "eval"),
    TEST: ("test",),
}


def limits() -> Limits:
    return Limits(max_bytes=settings.DATASET_MAX_BYTES)


# --- writing
# ---------------------------------------------------------------------------------------


def ingest(
    file: IO[bytes],
    *,
    name: str,
    owner,
    prompt_column: str = "",
    response_column: str = "",
    history_column: str = "",
    skip_bad_rows: bool = False,
    sheet: str = "",
    validation: IO[bytes] | None = None,
) -> Dataset:
    """Validates and stores an upload; returns the ready dataset with its warnings in `problems`.

    `file`: binary, seekable, with a `name` whose suffix tells CSV from JSON. `validation`: another
    such file, the validation split. Without `prompt_column` the columns are recognised from the
    first row; `sheet` names one of a workbook's. Raises DatasetRejected with worded problems, and
    then nothing has been stored.
    """
    try:
        with contextlib.ExitStack() as stack:
            sources = _opened_upload(file, sheet, stack)
            splits = _splits(sources)
            if validation is not None:
                held_out = _opened_upload(validation, sheet, stack)
                if len(held_out) > 1 or VALIDATION in splits:
                    members = ", ".join(source.name for source in [*splits.values(), *held_out])
                    raise rejected("two_files_for_split", split=VALIDATION, members=members[:300])
                splits[VALIDATION] = held_out[0]
            columns = Columns(prompt_column, response_column, history_column)
            if not prompt_column:
                columns = _recognised(splits[TRAIN])
            return _store(
                splits,
                columns,
                name=name.strip() or _name_of(file if len(sources) > 1 else sources[0]),
                owner=owner,
                source_name=Path(getattr(file, "name", "") or "").name,
                skip_bad_rows=skip_bad_rows,
            )
    except DatasetRejected as rejection:
        raise DatasetRejected(
            [worded(found) for found in rejection.problems], rejection.total
        ) from rejection


def _opened_upload(file: IO[bytes], sheet: str, stack: contextlib.ExitStack) -> list[Source]:
    name = Path(getattr(file, "name", "") or "upload.json").name
    sources = open_sources(file, name, limits(), sheet)
    for source in sources:
        if source.file is not file:
            stack.enter_context(source.file)
    return sources


def _name_of(source) -> str:
    """How an upload is called that nobody named: as its file, without what tells the format."""
    name = PurePosixPath(getattr(source, "name", "") or "upload").name
    return (
        re.sub(
            r"(\.(json|jsonl|csv|tsv|txt|ndjson|xlsx|zip|tgz|tar|gz))+$",
            "",
            name,
            flags=re.IGNORECASE,
        )
        or name
    )


def _recognised(source: Source) -> Columns:
    line, row = first_row(source, limits())
    found = suggest(list(row))
    if not found["format"]:
        raise DatasetRejected([problem("unknown_columns", line, columns=", ".join(row)[:300])])
    return Columns(found["prompt_column"], found["response_column"], found["history_column"])


def _splits(sources: list[Source]) -> dict[str, Source]:
    """Which file is which split. A single file is the training split, whatever its name."""
    if len(sources) == 1:
        return {TRAIN: sources[0]}
    named: dict[str, Source] = {}
    for source in sources:
        split = _split_of(PurePosixPath(source.path or source.name))
        if split in named:
            members = f"{named[split].path}, {source.path}"
            raise rejected("two_files_for_split", split=split, members=members)
        named[split] = source
    if TRAIN not in named:
        raise rejected("no_training_file", members=", ".join(s.name for s in sources)[:300])
    return {split: named[split] for split in _SPLIT_NAMES if split in named}


def _split_of(path: PurePosixPath) -> str:
    """By a word of the file's name; where it says nothing, of the folders that it lies in."""
    for part in (path.stem, *(folder.name for folder in path.parents)):
        words = set(re.split(r"[-_. ]+", part.lower()))
        for split, names in _SPLIT_NAMES.items():
            if words & set(names):
                return split
    return TRAIN


def _store(
    sources: dict[str, Source], columns: Columns, *, name, owner, source_name, skip_bad_rows=False
) -> Dataset:
    findings = Findings()
    lint = Lint(findings)
    for source in sources.values():
        findings.take(source.notes)
    with contextlib.ExitStack() as stack:
        writers = {}
        for split, source in sources.items():
            findings.member = source.name if len(sources) > 1 else ""
            before = findings.usable
            writer = stack.enter_context(Writer())
            lint.training = split == TRAIN
            writer.write(examples_of(source, columns, limits(), findings, lint))
            if findings.usable == before:
                findings.add("no_rows", None)
                skip_bad_rows = False  # a split without rows is of no use, whatever was asked
            writers[split] = writer
        if findings.errors and not skip_bad_rows:
            raise findings.rejection()
        with files_locked(), transaction.atomic():
            splits = {split: writer.publish() for split, writer in writers.items()}
            splits[TRAIN]["problems"] = findings.errors + findings.warnings
            dataset = Dataset.objects.create(
                owner=owner,
                name=name[:120],
                prompt_column=columns.prompt,
                response_column=columns.response or columns.prompt,
                history_column=columns.history,
                problems=[worded(found) for found in findings.problems],
            )
            _add_version(
                dataset, splits, source_name=source_name, encoding=sources[TRAIN].was_encoding
            )
    return dataset


def _add_version(
    dataset: Dataset, splits: dict, *, source_name: str, encoding: str, change: dict | None = None
) -> DatasetVersion:
    named = json.dumps({split: splits[split]["sha256"] for split in sorted(splits)})
    last = dataset.versions.aggregate(last=Max("number"))["last"] or 0
    return DatasetVersion.objects.create(
        dataset=dataset,
        number=last + 1,
        sha256=hashlib.sha256(named.encode()).hexdigest(),
        splits=splits,
        source_name=source_name[:255],
        encoding=encoding,
        change=change or {},
    )


def new_version(
    dataset: Dataset,
    parts: dict[str, Iterable[bytes]],
    *,
    base: DatasetVersion | None,
    change: dict[str, Any],
    described: dict[str, dict[str, Any]] | None = None,
) -> DatasetVersion:
    """A version after `base` (None: the first one) whose splits named in `parts` have these
    canonical lines; the others stay.

    `change`: what was done, in DatasetVersion.change. `described`: split -> what else its entry
    says. Raises ValidationError (code "changed_meanwhile") where `base` is not the newest any more,
    and for a split that would be left without rows.
    """
    with contextlib.ExitStack() as stack:
        writers = {split: stack.enter_context(Writer()) for split in parts}
        for split, lines in parts.items():
            writers[split].write(lines)
        # The rows are written by now: the lock on the database is short.
        with files_locked(), transaction.atomic():
            dataset = Dataset.objects.select_for_update().get(pk=dataset.pk)
            current = dataset.current
            if (current and current.number) != (base and base.number):
                message = _("Somebody has changed the dataset meanwhile. Look at it again.")
                raise ValidationError(message, code="changed_meanwhile")
            splits = dict(base.splits) if base else {}
            for split, writer in writers.items():
                entry = writer.publish()
                if not entry["rows"]:
                    message = _("No row would be left. Delete the dataset instead.")
                    raise ValidationError(message, code="no_rows")
                kept = {"problems", "seed"} & splits.get(split, {}).keys()
                entry |= {name: splits[split][name] for name in kept}
                splits[split] = entry | (described or {}).get(split, {})
            dataset.save(update_fields=["updated_at"])
            return _add_version(
                dataset,
                {name: splits[name] for name in _SPLIT_NAMES if name in splits},
                source_name=base.source_name if base else "",
                encoding=base.encoding if base else "",
                change=change,
            )


def add_split(dataset: Dataset, validation: int | float, seed: int = 42) -> DatasetVersion:
    """A new version whose validation split is drawn from the training rows: a number of rows, or a
    fraction below 1.

    Raises ValidationError when there is a validation split already, the number leaves nothing on
    one side or the files are gone.
    """
    version = dataset.current
    if version is None:
        raise ValidationError(_("The dataset has no rows."), code="no_rows")
    if VALIDATION in version.splits:
        raise ValidationError(
            _("The dataset has a validation split already."), code="already_split"
        )
    with opened(version, TRAIN) as train:
        count = round(validation * len(train)) if isinstance(validation, float) else validation
        if not 0 < count < len(train):
            message = _("Between 1 and %(most)s of the %(rows)s rows can be set aside.") % {
                "most": max(len(train) - 1, 0),
                "rows": len(train),
            }
            raise ValidationError({"validation": ValidationError(message, code="out_of_range")})
        chosen = set(random.Random(seed).sample(range(len(train)), count))
        return new_version(
            dataset,
            {
                TRAIN: (train.raw(row) for row in range(len(train)) if row not in chosen),
                VALIDATION: (train.raw(row) for row in sorted(chosen)),
            },
            base=version,
            change={"action": "split", "rows": count, "seed": seed},
            described={VALIDATION: {"seed": seed}},
        )


def delete(dataset: Dataset) -> None:
    """Takes a dataset out of sight. Versions that a run has used stay, with their files: a run's
    recipe keeps its meaning.

    Raises ValidationError (code "in_use") while a run that uses it is queued or running.
    """
    with files_locked(), transaction.atomic():
        dataset = Dataset.objects.select_for_update().get(pk=dataset.pk)
        if any(run.is_active for run in _runs(dataset)):
            raise ValidationError(
                _("A run that uses this dataset has not ended yet."), code="in_use"
            )
        CheckRun.objects.filter(dataset_version__dataset=dataset).delete()
        if _runs(dataset):
            dataset.deleted_at = timezone.now()
            dataset.save(update_fields=["deleted_at"])
            return
        digests = _digests(dataset.versions.all())
        dataset.delete()
        transaction.on_commit(lambda: _remove(digests))


def _runs(dataset: Dataset) -> list:
    versions = dataset.versions.all()
    # tuning and evaluation runs, checks
    related = [field.get_accessor_name() for field in DatasetVersion._meta.related_objects]
    return [run for version in versions for name in related for run in getattr(version, name).all()]


def _digests(versions: Iterable[DatasetVersion]) -> set[str]:
    return {entry["sha256"] for version in versions for entry in version.splits.values()}


def _remove(digests: set[str]) -> None:
    for sha256 in digests - _digests(DatasetVersion.objects.all()):
        for path in paths_of(sha256):
            path.unlink(missing_ok=True)


def ensure_sample() -> None:
    """Registers the sample dataset that comes with the project: no owner, training and validation
    split. Safe to call again.
    """
    folder = settings.BASE_DIR / "chat" / "starter" / "sample"
    found = Dataset.objects.filter(owner=None, name=SAMPLE_NAME).first()
    if found is not None and all(
        path.exists() for sha256 in _digests([found.current]) for path in paths_of(sha256)
    ):
        return
    with open(folder / "train.json", "rb") as train, open(folder / "dev.json", "rb") as dev:
        sources = {TRAIN: Source("train.json", train), VALIDATION: Source("dev.json", dev)}
        columns = Columns("content", "summary")
        if found is None:
            _store(
                sources, columns, name=SAMPLE_NAME, owner=None, source_name="chat/starter/sample"
            )
            return
        for source in sources.values():  # the data folder was emptied behind the database's back
            with Writer() as writer, files_locked():
                writer.write(examples_of(source, columns, limits(), Findings()))
                writer.publish()


# --- reading
# ---------------------------------------------------------------------------------------


def open_split(version: DatasetVersion, split: str) -> Split:
    """Random access to a split. Raises KeyError when the version has no such split,
    FileNotFoundError when its files are gone.
    """
    return Split(version.splits[split]["sha256"])


def opened(version: DatasetVersion, split: str) -> Split:
    """`open_split` for people. ValidationError when the files are gone."""
    try:
        return open_split(version, split)
    except FileNotFoundError:
        message = _("The dataset's files are missing in the data folder. Upload them again.")
        raise ValidationError(message, code="files_missing") from None


def examples(version: DatasetVersion, split: str, start: int, count: int) -> list[dict[str, Any]]:
    """Rows start (from 0) to start + count of a split, as many as there are. ValidationError when
    the files are gone.
    """
    with opened(version, split) as rows:
        return [rows[row] for row in range(max(start, 0), min(start + count, len(rows)))]


def detect_columns(file: IO[bytes]) -> dict[str, Any]:
    """What the first row suggests, before anything is stored; reads at most a megabyte of an
    upload.

    {"format", "prompt_column", "response_column", "history_column", "columns", "encoding",
    "member", "row"}; format and the three columns are "" when nothing fits. Raises DatasetRejected
    with worded problems when there is no row to look at.
    """
    try:
        member, head = read_head(
            file, Path(getattr(file, "name", "") or "upload.json").name, limits()
        )
        with tempfile.SpooledTemporaryFile(max_size=1 << 21) as copy:
            copy.write(head)
            source = as_text(member, copy, whole=False)
            with source.file:
                _line, row = first_row(source, limits())
        row = json.loads(printable(json.dumps(row, ensure_ascii=False)))
    except DatasetRejected as rejection:
        raise DatasetRejected(
            [worded(found) for found in rejection.problems], rejection.total
        ) from rejection
    finally:
        file.seek(0)
    return {
        **suggest(list(row)),
        "columns": list(row),
        "encoding": source.was_encoding,
        "member": member,
        "row": row,
    }
