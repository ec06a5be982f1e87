"""Why a request was not served, in the one error envelope, for the doors that are not DRF's."""

from django.core.exceptions import ValidationError
from django.http import JsonResponse
from django.utils.translation import gettext as _
from rest_framework import exceptions

from chat.api.completion import GenerationFailed, LoginOver
from chat.engine.request import GenerationRefused
from chat.worker.router import WorkerUnavailable
from portal.budget.holds import OverBudget
from portal.explanations import explained
from portal.rest.api_keys import KeyRefused, why_no_key
from portal.rest.conventions import READABLE, Unavailable, error, json_error
from portal.runs.lifecycle import TooManyQueued
from portal.text import shown

RETRY_AFTER = 5  # seconds, where nobody knows better
# an answer was taken and waited for its model, which did not come
NO_MODEL = ("worker_loading", "chat_paused", "loading_failed", "no_worker_for_checkpoint")
REFUSALS = (ValidationError, GenerationRefused, GenerationFailed)


def problems_of(refusal: ValidationError) -> list[dict]:
    """[{"param", "message", "code"}] of a ValidationError({field: ...}) or of one sentence."""
    if not hasattr(refusal, "error_dict"):
        refusal = ValidationError({"__all__": refusal})
    return [
        {"param": None if field == "__all__" else field, "message": message, "code": one.code}
        for field, errors in refusal.error_dict.items()
        for one in errors
        for message in one.messages
    ]


def object_of(refusal: Exception) -> dict:
    """The error object (what stands below "error") of one of REFUSALS."""
    if isinstance(refusal, ValidationError):
        problems = problems_of(refusal)
        return error(**problems[0], problems=problems)["error"]
    if isinstance(refusal, GenerationFailed):
        if refusal.error.get("code") in NO_MODEL:
            return {**refusal.error, "message": explained(refusal.error)}
        return refusal.error
    assert isinstance(refusal, GenerationRefused)
    told = refusal.as_error()
    if isinstance(refusal, WorkerUnavailable):
        told["message"] = why_unavailable(refusal)
    return told


def why_unavailable(refusal: WorkerUnavailable) -> str:
    if refusal.code == "worker_loading":
        return _("The model is being loaded; try again in a moment.")
    if refusal.code == "no_worker_for_checkpoint":
        return _("No worker serves this checkpoint at the moment: %(reason)s") % {
            "reason": refusal.message
        }
    return _("The model is not available at the moment; try again soon.")


def response_of(refusal: Exception) -> JsonResponse:
    """One of REFUSALS with its HTTP status: 400 for a bad request, 429 for one too many, 503 with
    Retry-After for a bad moment, 500 for a fault.
    """
    headers = {}
    if isinstance(refusal, GenerationRefused) and refusal.later:
        status = 503
        headers["Retry-After"] = str(refusal.retry_after or RETRY_AFTER)
    elif isinstance(refusal, OverBudget | TooManyQueued):
        return json_error(
            429,
            refusal.message,
            code=refusal.code,
            headers={"Retry-After": str(getattr(refusal, "wait", RETRY_AFTER))},
        )
    elif isinstance(refusal, LoginOver):
        status = 401
    elif isinstance(refusal, GenerationFailed) and refusal.error.get("code") in NO_MODEL:
        status = 503
        headers["Retry-After"] = str(RETRY_AFTER)
    elif isinstance(refusal, GenerationFailed):
        status = 400 if refusal.error.get("type") == "invalid_request_error" else 500
    else:
        status = 400
    refused = object_of(refusal)
    if isinstance(refusal, ValidationError):  # clients show their user the message alone
        refused["message"] = " ".join(
            f"{problem['param']}: {problem['message']}" if problem["param"] else problem["message"]
            for problem in refused["problems"]
        )
    return JsonResponse(
        {"error": refused}, status=status, headers=headers, json_dumps_params=READABLE
    )


def as_api_exception(refusal: GenerationRefused) -> exceptions.APIException:
    """The same for DRF's views."""
    if isinstance(refusal, WorkerUnavailable):
        message = _("The model is not available at the moment; try again soon.")
        return Unavailable(message, "worker_unavailable")
    if refusal.later:
        return Unavailable(refusal.message, refusal.code, wait=refusal.retry_after or RETRY_AFTER)
    problem = exceptions.ErrorDetail(refusal.message, refusal.code)
    return exceptions.ValidationError({refusal.param or "content": [problem]})


def no_key(request) -> JsonResponse:
    message = why_no_key(request.headers.get("Authorization", ""))
    return json_error(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def key_refused(refusal: KeyRefused) -> JsonResponse:
    headers = {"Retry-After": str(refusal.wait)} if refusal.wait else None
    return json_error(refusal.status, refusal.message, code=refusal.code, headers=headers)


def no_such_model(name: str) -> JsonResponse:
    message = _(
        "The model “%(name)s” does not exist, or is not yours. GET /v1/models lists what there is."
    )
    return json_error(
        404, message % {"name": shown(name, 240)}, code="model_not_found", param="model"
    )
