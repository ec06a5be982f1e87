"""/v1/files as OpenAI's clients know them: training files, which are the portal's datasets, and
files of batches (chat/batches/files.py).
"""

import json
from collections.abc import AsyncIterator

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.exceptions import ValidationError
from django.http import FileResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.utils.translation import gettext as _

from chat.api.openai import for_scripts_in_thread
from chat.api.openai_pages import listed, listed_whole, number_of
from chat.batches import files as batch_files
from chat.models import ApiFile
from portal.access import get_visible
from portal.explanations import sentence
from portal.rest.conventions import READABLE, Conflict, json_error
from tuning.datasets import store
from tuning.models import Dataset, DatasetVersion

PURPOSE = "fine-tune"
FORM_ROOM = 1 << 20  # bytes of a multipart body beside the file itself
ROWS_AT_ONCE = 500


def file_id(dataset: Dataset) -> str:
    return f"file-{dataset.pk}"


def dataset_of(user, file: str) -> Dataset:
    """Http404 where there is none that `user` sees."""
    return get_visible(Dataset.objects.all(), user, pk=number_of(file, "file-"))


@for_scripts_in_thread("POST", "GET", "HEAD", scope="data")
def files(request, user) -> HttpResponseBase:
    """POST /v1/files (multipart: purpose, file), GET /v1/files"""
    if request.method == "POST":
        return _upload(request, user)
    datasets = Dataset.objects.visible_to(user).prefetch_related("versions")
    others = ApiFile.objects.visible_to(user)
    wanted = request.GET.get("purpose")
    if wanted == PURPOSE:
        return listed(request, datasets, "file-", told)
    if wanted:
        return listed(request, others.filter(purpose=wanted), batch_files.PREFIX, batch_files.told)
    entries = [*map(told, datasets), *map(batch_files.told, others)]
    newest_first = request.GET.get("order") != "asc"
    entries.sort(key=lambda entry: entry["created_at"], reverse=newest_first)
    return listed_whole(request, entries)


def _upload(request, user) -> JsonResponse:
    length = request.META.get("CONTENT_LENGTH") or "0"
    most = settings.DATASET_MAX_BYTES
    if length.isdigit() and int(length) > most + FORM_ROOM:
        message = sentence(store.MESSAGES, "too_large", {"limit": most >> 20})
        return json_error(413, message, code="too_large", param="file")
    purpose, file = request.POST.get("purpose"), request.FILES.get("file")
    if purpose not in (PURPOSE, ApiFile.Purpose.BATCH):
        message = _("Only files with the purposes “fine-tune” and “batch” are kept here.")
        raise ValidationError({"purpose": ValidationError(message, "invalid_value")})
    if file is None:
        message = _("Send a file.")
        raise ValidationError({"file": ValidationError(message, "missing_required_parameter")})
    if purpose == ApiFile.Purpose.BATCH:
        kept = batch_files.received(user, file)
        return JsonResponse(batch_files.told(kept), json_dumps_params=READABLE)
    try:
        dataset = store.ingest(file, name="", owner=user)
    except store.DatasetRejected as rejected:
        message = store.in_short(rejected)
        return json_error(
            400,
            message,
            code=rejected.problems[0]["code"],
            param="file",
            problems=rejected.problems,
        )
    return JsonResponse(told(dataset), json_dumps_params=READABLE)


@for_scripts_in_thread("GET", "HEAD", "DELETE", scope="data")
def file(request, user, name: str) -> HttpResponseBase:
    """GET, DELETE /v1/files/{id}"""
    if name.startswith(batch_files.PREFIX):
        return _batch_file(request, batch_files.file_named(user, name))
    dataset = dataset_of(user, name)
    if request.method != "DELETE":
        return JsonResponse(told(dataset), json_dumps_params=READABLE)
    if not Dataset.objects.changeable_by(user).filter(pk=dataset.pk).exists():
        return json_error(403, _("Only the owner may change this."), code="permission_denied")
    deleted = file_id(dataset)
    try:
        store.delete(dataset)
    except ValidationError as fault:
        raise Conflict(fault.messages[0], code="in_use") from fault
    return JsonResponse({"id": deleted, "object": "file", "deleted": True})


def _batch_file(request, kept: ApiFile) -> HttpResponseBase:
    if request.method != "DELETE":
        return JsonResponse(batch_files.told(kept), json_dumps_params=READABLE)
    deleted = batch_files.file_id(kept)
    try:
        batch_files.delete(kept)
    except ValidationError as fault:
        raise Conflict(fault.messages[0], code="in_use") from fault
    return JsonResponse({"id": deleted, "object": "file", "deleted": True})


@for_scripts_in_thread("GET", "HEAD", scope="data")
def content(request, user, name: str) -> HttpResponseBase:
    """GET /v1/files/{id}/content: the examples as OpenAI's `messages`, whatever was uploaded; a
    batch's file as it is.
    """
    if name.startswith(batch_files.PREFIX):
        kept = batch_files.file_named(user, name)
        return FileResponse(open(kept.path, "rb"), content_type="application/jsonl")
    version = dataset_of(user, name).current
    if version is None or store.TRAIN not in version.splits:
        return json_error(404, _("The dataset has no rows to train on."), code="not_found")
    return StreamingHttpResponse(_rows(version), content_type="application/jsonl")


async def _rows(version: DatasetVersion) -> AsyncIterator[str]:
    read = sync_to_async(store.examples)
    for start in range(0, version.splits[store.TRAIN]["rows"], ROWS_AT_ONCE):
        for row in await read(version, store.TRAIN, start, ROWS_AT_ONCE):
            turns = [
                {"role": role, "content": text}
                for pair in [*row["history"], [row["prompt"], row["response"]]]
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            yield json.dumps({"messages": turns}, ensure_ascii=False) + "\n"


def told(dataset: Dataset) -> dict:
    version = next(iter(dataset.versions.all()), None)  # newest first
    splits = version.splits.values() if version else ()
    return {
        "id": file_id(dataset),
        "object": "file",
        "bytes": sum(split.get("bytes", 0) for split in splits),
        "created_at": int(dataset.created_at.timestamp()),
        "expires_at": None,
        "filename": (version and version.source_name) or dataset.name,
        "purpose": PURPOSE,
        "status": "processed",  # an upload is checked while it is sent
        "status_details": None,
    }
