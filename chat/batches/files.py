"""Files that programs send and fetch, beside the datasets (tuning/openai_files.py)."""

from __future__ import annotations

import os
from pathlib import Path

from django.conf import settings
from django.core.exceptions import ValidationError
from django.http import Http404
from django.utils.translation import gettext as _

from chat.models import ApiFile, BatchRun
from portal.access import get_visible
from portal.numbers import whole_number

PREFIX = "file-batch-"
MOST_BYTES = 200 << 20  # as OpenAI's
LONGEST_NAME = 200


def file_id(file: ApiFile) -> str:
    return f"{PREFIX}{file.pk}"


def file_named(user, spelt) -> ApiFile:
    """Http404 where there is none that `user` sees."""
    number = whole_number(spelt.removeprefix(PREFIX)) if isinstance(spelt, str) else None
    if number is None or not spelt.startswith(PREFIX):
        raise Http404
    return get_visible(ApiFile.objects.all(), user, pk=number)


def received(user, upload) -> ApiFile:
    """Keeps an uploaded file for a batch; what is in it is looked at when the batch begins."""
    if upload.size > MOST_BYTES:
        message = _("The file is larger than %(most)s MiB.") % {"most": MOST_BYTES >> 20}
        raise ValidationError({"file": ValidationError(message, "too_large")})
    name = (upload.name or "batch.jsonl")[-LONGEST_NAME:]
    file = ApiFile(owner=user, purpose=ApiFile.Purpose.BATCH, name=name, size=upload.size)
    file.path.parent.mkdir(parents=True, exist_ok=True)
    with open(file.path, "wb") as target:
        for piece in upload.chunks():
            target.write(piece)
        target.flush()
        os.fsync(target.fileno())
    file.save()
    return file


def made(run: BatchRun, path: Path, name: str) -> ApiFile | None:
    """What a batch has written, as a file of its owner's; None: nothing. The same file when asked
    again.
    """
    if not path.exists() or not path.stat().st_size:
        return None
    key = f"{run.pk:x}-{run.key}-{name}"[:32]
    place = settings.DATA_DIR / "files" / key
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        os.link(path, place)
    fields = {
        "owner": run.owner,
        "purpose": ApiFile.Purpose.BATCH_OUTPUT,
        "name": f"batch_{run.pk}_{name}.jsonl",
        "size": path.stat().st_size,
    }
    return ApiFile.objects.get_or_create(key=key, defaults=fields)[0]


def delete(file: ApiFile) -> None:
    """ValidationError while a batch needs it."""
    if file.batches.exists():
        raise ValidationError(_("A batch was made of this file."))
    file.delete()
    file.path.unlink(missing_ok=True)


def told(file: ApiFile) -> dict:
    return {
        "id": file_id(file),
        "object": "file",
        "bytes": file.size,
        "created_at": int(file.created_at.timestamp()),
        "expires_at": None,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
