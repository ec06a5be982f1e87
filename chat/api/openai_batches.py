"""/v1/batches as OpenAI's clients know them."""

from django.core.exceptions import ValidationError
from django.db import transaction
from django.http import Http404, HttpResponseBase, JsonResponse
from django.utils.translation import gettext as _

from chat.api.openai import for_scripts_in_thread, parsed_body
from chat.api.openai_pages import listed, number_of
from chat.batches import files
from chat.batches.work import EXPIRED, WINDOW, begin, endpoints, publish
from chat.models import ApiFile, BatchRun
from portal.access import get_visible
from portal.models import Run
from portal.rest.conventions import READABLE, Conflict
from portal.runs import lifecycle
from portal.runs.once import once

MOST_METADATA = 16  # as OpenAI's
ENDED = {Run.Status.SUCCEEDED: "completed", Run.Status.CANCELLED: "cancelled"}


@for_scripts_in_thread("POST", "GET", "HEAD", scope="chat")
def batches(request, user) -> HttpResponseBase:
    """POST, GET /v1/batches"""
    if request.method == "POST":
        body, key = parsed_body(request), request.headers.get("Idempotency-Key", "")
        return _batch(once(user, key, [request.path, body], lambda: _created(body, user)))
    return listed(request, _runs(user), "batch_", told)


@for_scripts_in_thread("GET", "HEAD", scope="chat")
def batch(request, user, name: str) -> HttpResponseBase:
    """GET /v1/batches/{id}"""
    return _batch(_run(user, name))


@for_scripts_in_thread("POST", scope="chat")
def cancel(request, user, name: str) -> HttpResponseBase:
    """POST /v1/batches/{id}/cancel: what is answered stays and is given out."""
    run = _run(user, name)
    if run.status not in Run.ACTIVE:
        message = _("The batch has ended: %(status)s.") % {"status": status_of(run)}
        raise Conflict(message, code="invalid_state")
    lifecycle.cancel(run)
    run = _run(user, name)
    if run.status == Run.Status.CANCELLED:  # it waited for its turn
        publish(run)
    return _batch(_run(user, name))


def _runs(user):
    return BatchRun.objects.visible_to(user).select_related("source", "output", "errors")


def _run(user, name: str) -> BatchRun:
    return get_visible(_runs(user), user, pk=number_of(name, "batch_"))


def _batch(run: BatchRun) -> JsonResponse:
    return JsonResponse(told(run), json_dumps_params=READABLE)


def _created(body, user) -> BatchRun:
    if not isinstance(body, dict):
        message = _("The body must be a JSON object.")
        raise ValidationError({"__all__": ValidationError(message, "invalid_json")})
    problems: dict[str, ValidationError] = {}
    endpoint, metadata = body.get("endpoint"), body.get("metadata") or {}
    if not isinstance(endpoint, str) or endpoint not in endpoints():
        message = _("The endpoints of batches are %(endpoints)s.")
        told = {"endpoints": ", ".join(endpoints())}
        problems["endpoint"] = ValidationError(message % told, "invalid_value")
    if body.get("completion_window") != "24h":
        problems["completion_window"] = ValidationError(_("Must be “24h”."), "invalid_value")
    if (
        not isinstance(metadata, dict)
        or len(metadata) > MOST_METADATA
        or not all(isinstance(value, str) and len(value) <= 512 for value in metadata.values())
    ):
        message = _("Must be an object of up to %(most)s texts.") % {"most": MOST_METADATA}
        problems["metadata"] = ValidationError(message, "invalid_value")
    source = None
    try:
        source = files.file_named(user, body.get("input_file_id"))
    except Http404:
        source = None
    if source is None or source.purpose != ApiFile.Purpose.BATCH:
        message = _("There is no such file; upload one with the purpose “batch”.")
        problems["input_file_id"] = ValidationError(message, "not_found")
    if problems:
        raise ValidationError(problems)
    with transaction.atomic():
        return begin(user, source, str(endpoint), metadata)


def status_of(run: BatchRun) -> str:
    """In OpenAI's words."""
    if run.status in ENDED:
        return ENDED[run.status]
    if run.status == Run.Status.FAILED:
        return "expired" if (run.error or {}).get("code") == EXPIRED else "failed"
    if run.cancel_requested:
        return "cancelling"
    if run.validated_at is None:
        return "validating"
    return "finalizing" if run.phase == Run.Phase.SAVING else "in_progress"


def told(run: BatchRun) -> dict:
    def at(when, status: str | None = None) -> int | None:
        there = when is not None and status in (None, state)
        return int(when.timestamp()) if there else None

    state = status_of(run)
    problems = run.problems
    if state == "failed" and not problems:
        problems = [{"param": None, "line": None, **(run.error or {})}]
    return {
        "id": f"batch_{run.pk}",
        "object": "batch",
        "endpoint": run.recipe["endpoint"],
        "errors": {"object": "list", "data": problems} if problems else None,
        "input_file_id": files.file_id(run.source),
        "completion_window": "24h",
        "status": state,
        "output_file_id": run.output and files.file_id(run.output),
        "error_file_id": run.errors and files.file_id(run.errors),
        "created_at": at(run.created_at),
        "in_progress_at": at(run.validated_at),
        "expires_at": at(run.created_at + WINDOW),
        "finalizing_at": at(run.finished_at, "completed"),
        "completed_at": at(run.finished_at, "completed"),
        "failed_at": at(run.finished_at, "failed"),
        "expired_at": at(run.finished_at, "expired"),
        "cancelling_at": at(run.finished_at, "cancelled"),
        "cancelled_at": at(run.finished_at, "cancelled"),
        "request_counts": {
            "total": run.total,
            "completed": max(0, run.progress - run.failed),
            "failed": run.failed,
        },
        "metadata": run.recipe["metadata"],
    }
