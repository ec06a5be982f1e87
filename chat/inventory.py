"""What checkpoints take on disk, who uses them, what deleting one would break, and what lies there
that nothing knows any more.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from django.conf import settings
from django.db.models import Count, OuterRef, ProtectedError, Subquery
from django.db.models.functions import Coalesce
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from chat.checkpoints.fetch.failures import FetchFailed
from chat.checkpoints.fetch.sources import (
    LocalPath,
    PackagedModel,
    Source,
    parse_source,
    work_folder,
)
from chat.checkpoints.provenance import SOURCE_FILE
from chat.models import Adapter, Checkpoint, FetchRun
from chat.registry import remove_checkpoint
from portal.models import Run
from portal.rest.conventions import Conflict
from portal.runs.heartbeat import RunFailed

ENTRIES = 20_000  # files that are counted in one folder at most


def home() -> Path:
    """Where checkpoints lie that were fetched, or made by a run."""
    return settings.DATA_DIR / "checkpoints"


def incoming() -> Path:
    """Where they are made."""
    return home() / ".incoming"


def made_before(run_id: int) -> Path | None:
    """The folder that a run moved in before it was killed, to be registered yet."""
    for note in home().glob(f"*/{SOURCE_FILE}"):
        try:
            if json.loads(note.read_text(encoding="utf-8")).get("run") == run_id:
                return note.parent
        except (OSError, ValueError, AttributeError):
            continue
    return None


def move_in(folder: Path, wish: str, run_id: int) -> Path:
    """Moves what a run has made to a free name like `wish` among the checkpoints, and notes in it
    which run that was.
    """
    note = folder / SOURCE_FILE
    told = json.loads(note.read_text(encoding="utf-8")) | {"run": run_id}
    note.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    wish = re.sub(r"[^\w.-]+", "-", wish).strip(".-") or "checkpoint"
    home().mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        place = home() / (wish if number == 1 else f"{wish}-{number}")
        if not place.exists():
            os.replace(folder, place)
            return place
    raise RunFailed("disk_full", f"there are too many folders named {wish}")


@dataclass
class Stored:
    """A checkpoint and what hangs on it. `ours`: its folder was fetched or made here,
    so it goes with it.
    """

    checkpoint: Checkpoint
    bytes: int | None  # None: served elsewhere, or not readable
    ours: bool
    adapters: int = 0
    runs: int = 0
    conversations: int = 0

    @property
    def uses(self) -> list[str]:
        """Who uses it, in words."""
        told = []
        if self.checkpoint.is_default:
            told.append(_("the default: every chat without another choice"))
        counts = (
            (self.adapters, ngettext("%(n)s tuned model", "%(n)s tuned models", self.adapters)),
            (self.runs, ngettext("%(n)s run", "%(n)s runs", self.runs)),
            (
                self.conversations,
                ngettext("%(n)s conversation", "%(n)s conversations", self.conversations),
            ),
        )
        return told + [text % {"n": number} for number, text in counts if number]

    @property
    def breaks(self) -> str:
        """What deleting it would do beside; "" for nothing."""
        if self.runs:
            return _("Runs name it as their base: it cannot be deleted while they are there.")
        if self.checkpoint.is_default:
            return _("It is what chats are answered with: make another the default first.")
        if self.adapters:
            return _("Its tuned models would be deleted with it.")
        return ""

    @property
    def deletable(self) -> bool:
        return not self.runs and not self.checkpoint.is_default and not self.checkpoint.is_starter


@dataclass
class Orphan:
    """A folder that nothing knows any more. `kind`: checkpoint | download | adapter."""

    kind: str
    path: Path
    bytes: int
    name: str = field(default="")

    @property
    def key(self) -> str:
        """Its path below DATA_DIR: what a page sends back."""
        return str(self.path.relative_to(settings.DATA_DIR))


def folder_bytes(folder: Path) -> int | None:
    """Bytes on the disk (a sparse file counts what it really takes); links count nothing."""
    total = number = 0
    try:
        for root, _folders, names in os.walk(folder):
            for name in names:
                status = os.lstat(os.path.join(root, name))
                total += status.st_blocks * 512
                number += 1
                if number > ENTRIES:
                    return None
    except OSError:
        return None
    return total if number else None


def _count_of(related: str) -> Coalesce:
    """How many rows of a kind name a checkpoint, as a subquery."""
    field = Checkpoint._meta.get_field(related)
    rows = field.related_model._base_manager.filter(**{field.field.name: OuterRef("pk")})
    counted = rows.order_by().values(field.field.name).annotate(count=Count("pk")).values("count")
    return Coalesce(Subquery(counted), 0)


def stored(user) -> list[Stored]:
    """Every checkpoint, the default first."""
    # counted one by one: joined, every adapter would stand beside every run and conversation
    counts = {
        f"{name}_count": _count_of(related)
        for name, related in (
            ("adapter", "adapters"),
            ("tuning", "tuning_runs"),
            ("evaluation", "evaluation_runs"),
            ("conversation", "conversation"),
        )
    }
    found = Checkpoint.objects.visible_to(user).annotate(**counts)
    return [
        Stored(
            one,
            folder_bytes(Path(one.path)) if one.path else None,
            is_ours(one),
            one.adapter_count,
            one.tuning_count + one.evaluation_count,
            one.conversation_count,
        )
        for one in found
    ]


def is_ours(checkpoint: Checkpoint) -> bool:
    """Whether its folder was made by a run of ours, so that nobody else owns it."""
    return bool(checkpoint.path) and Path(checkpoint.path).parent == home()


def orphans() -> list[Orphan]:
    """Folders below DATA_DIR that no row names: checkpoints, unfinished downloads, adapters."""
    known = {Path(path) for path in Checkpoint.objects.values_list("path", flat=True)}
    busy = {
        work_folder(incoming(), source)
        for text in FetchRun.objects.filter(status__in=Run.ACTIVE).values_list("source", flat=True)
        if (source := _parsed(text)) is not None
    }
    adapters = set(Adapter.objects.values_list("folder", flat=True))
    found = []
    for path in _folders(home()):
        if path not in known and path != incoming():
            found.append(Orphan("checkpoint", path, folder_bytes(path) or 0, path.name))
    for path in _folders(incoming()):
        if path not in busy:
            found.append(Orphan("download", path, folder_bytes(path) or 0, _download_name(path)))
    for path in _folders(settings.DATA_DIR / "adapters"):
        if str(path.relative_to(settings.DATA_DIR)) not in adapters and _is_old(path):
            found.append(Orphan("adapter", path, folder_bytes(path) or 0, path.name[:12]))
    return found


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []


def _is_old(path: Path) -> bool:
    """An adapter's folder is there a moment before its row."""
    return time.time() - path.stat().st_mtime > 3600


def _parsed(text: str) -> Source | None:
    try:
        return parse_source(text)
    except FetchFailed:  # a folder that is gone by now
        return LocalPath("folder", Path(text)) if text.startswith("/") else None


def _download_name(path: Path) -> str:
    for text in FetchRun.objects.order_by("-id").values_list("source", flat=True)[:500]:
        source = _parsed(text)
        if source is not None and work_folder(incoming(), source) == path:
            return source.model.title if isinstance(source, PackagedModel) else source.key
    return path.name


def remove(checkpoint: Checkpoint) -> None:
    """Deletes a checkpoint, its tuned models, and its folder when it was fetched. Conflict when it
    is in use.
    """
    if checkpoint.is_default or checkpoint.is_starter:
        raise Conflict(
            _("“%(name)s” is what chats are answered with, or came with the portal.")
            % {"name": checkpoint.name},
            "checkpoint_in_use",
        )
    folder = Path(checkpoint.path) if is_ours(checkpoint) else None
    try:
        remove_checkpoint(checkpoint)
    except ProtectedError as error:
        raise Conflict(
            _("%(number)s runs name “%(name)s” as their base.")
            % {"number": len(error.protected_objects), "name": checkpoint.name},
            "checkpoint_in_use",
        ) from error
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def remove_orphan(key: str) -> bool:
    """Deletes an orphan by its key; False when there is none of this key (any more)."""
    found = next((one for one in orphans() if one.key == key), None)
    if found is not None:
        shutil.rmtree(found.path, ignore_errors=True)
    return found is not None
