"""Conventions of the REST API: one error envelope, cursor pages, and the shape of a run."""

import re

from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import PermissionDenied, RequestDataTooBig
from django.http import Http404, HttpResponsePermanentRedirect, JsonResponse
from django.urls import resolve
from django.utils.translation import gettext as _
from django.views.decorators.csrf import csrf_exempt
from rest_framework import exceptions, serializers, status
from rest_framework.pagination import CursorPagination
from rest_framework.response import Response
from rest_framework.views import set_rollback

from portal.models import Run
from portal.numbers import whole_number

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# what /v1/ does
OPENAI_PATHS = (
    "chat/completions",
    "completions",
    "responses",
    "models",
    "files",
    "batches",
    "fine_tuning/jobs",
)
READABLE = {"ensure_ascii": False}  # for JsonResponse: Chinese as it is, as DRF writes it


def error(
    message: str,
    *,
    type: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    **more,
) -> dict:
    """OpenAI's error object inside its envelope; `more` adds fields such as `problems`. What a
    client sent and is told again may hold half a character, which no answer can carry.
    """
    told = {"message": message, "type": type, "param": param, "code": code, **more}
    return {"error": _sayable(told)}


def _sayable(told):
    if isinstance(told, str):
        return told.encode(errors="replace").decode()
    if isinstance(told, dict):
        return {_sayable(name): _sayable(each) for name, each in told.items()}
    if isinstance(told, list | tuple):
        return [_sayable(each) for each in told]
    return told


def json_error(
    http_status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers=None,
    **more,
):
    """The envelope as a plain Django response, for views outside DRF."""
    kind = TYPES.get(http_status, "invalid_request_error" if http_status < 500 else "server_error")
    body = error(message, type=kind, code=code, param=param, **more)
    return JsonResponse(body, status=http_status, headers=headers, json_dumps_params=READABLE)


@csrf_exempt  # nothing happens here
@login_not_required
def no_interface(request):
    """Every other path below /api/ and /v1/: a 404 in JSON, or the way to the path that differs by
    the slash at its end.
    """
    if resolve(_slash_changed(request.path_info)).func is not no_interface:
        path, question_mark, query = request.get_full_path().partition("?")
        # 308: a POST stays a POST
        return HttpResponsePermanentRedirect(
            f"{_slash_changed(path)}{question_mark}{query}", preserve_request=True
        )
    match = re.match(OPENAI_PATH, request.path_info)
    if match and resolve(f"/v1/{match[1]}").func is not no_interface:
        return wrong_base(request)
    if request.path_info.startswith("/v1"):
        message = _("There is no such interface. Below /v1/ there are: %(paths)s.")
        return json_error(404, message % {"paths": ", ".join(OPENAI_PATHS)}, code="not_found")
    return json_error(
        404, _("There is no such interface; /api/docs/ lists what there is."), code="not_found"
    )


# what OpenAI's clients put behind the base address they were given
OPENAI_PATH = (
    r"^(?:.*?/)??((?:chat/)?completions|responses|embeddings|models|files|batches"
    r"|fine_tuning/jobs)/?$"
)


@csrf_exempt  # nothing happens here
@login_not_required
def wrong_base(request, *_groups):
    """A path of OpenAI's API below another base than /v1: a 404 in JSON that names the right
    one.
    """
    path = re.match(OPENAI_PATH, request.path_info)[1]
    message = _(
        "Nothing is at this address. Use /v1/%(path)s: a client's base address is %(base)s."
    )
    base = f"{request.scheme}://{request.get_host()}/v1"
    return json_error(404, message % {"path": path, "base": base}, code="not_found")


def _slash_changed(path: str) -> str:
    return path.rstrip("/") if path.endswith("/") else f"{path}/"


def _problems(detail, param=None) -> list[dict]:
    """DRF's nested error detail as a flat list of {param, message, code}: every problem of a body
    at once.
    """
    if isinstance(detail, dict):
        return [
            p
            for key, value in detail.items()
            for p in _problems(value, key if param is None else f"{param}.{key}")
        ]
    if isinstance(detail, (list, tuple)):
        return [p for value in detail for p in _problems(value, param)]
    return [
        {
            "param": None if param == "non_field_errors" else param,
            "message": str(detail),
            "code": getattr(detail, "code", None),
        }
    ]


def error_response(exc, context):
    """DRF's exception handler: everything that goes wrong leaves as {"error": {...}}."""
    if isinstance(exc, Http404):
        exc = exceptions.NotFound(_("Not found."))
    elif isinstance(exc, PermissionDenied):
        exc = exceptions.PermissionDenied()
    elif isinstance(exc, RequestDataTooBig):
        exc = TooLarge(_("The body is too large."))
    if not isinstance(exc, exceptions.APIException):
        return None  # a fault of ours: Django's 500, logged with its traceback
    headers = {}
    if getattr(exc, "auth_header", None):
        headers["WWW-Authenticate"] = exc.auth_header
    if getattr(exc, "wait", None):
        headers["Retry-After"] = str(int(exc.wait))
    problems = _problems(exc.detail)
    first = (
        problems[0] if problems else {"param": None, "message": str(exc), "code": exc.default_code}
    )
    kind = TYPES.get(
        exc.status_code, "invalid_request_error" if exc.status_code < 500 else "server_error"
    )
    body = error(first["message"], type=kind, param=first["param"], code=first["code"])
    if isinstance(exc, exceptions.ValidationError):
        body["error"]["problems"] = _sayable(problems)
    set_rollback()
    return Response(body, status=exc.status_code, headers=headers)


class Conflict(exceptions.APIException):
    status_code = status.HTTP_409_CONFLICT
    default_code = "conflict"


class TooLarge(exceptions.APIException):
    status_code = status.HTTP_413_REQUEST_ENTITY_TOO_LARGE
    default_code = "too_large"


class Unavailable(exceptions.APIException):
    """503 with Retry-After, for a worker that is not up or a queue that is full."""

    status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    default_code = "unavailable"

    def __init__(self, detail=None, code=None, wait: int = 5):
        super().__init__(detail, code)
        self.wait = wait


class Pages(CursorPagination):
    """Pages by a whole number that rises or falls, such as the id."""

    ordering = "-id"
    page_size_query_param = "page_size"
    max_page_size = 500

    def get_page_size(self, request):
        """DRF would overlook what is no number."""
        wish = request.query_params.get(self.page_size_query_param)
        if wish is None:
            return self.page_size
        number = whole_number(wish)
        if not number or number < 1:
            raise exceptions.ValidationError({self.page_size_query_param: [_("A number from 1.")]})
        return min(number, self.max_page_size)

    def get_schema_operation_parameters(self, view):
        told = super().get_schema_operation_parameters(view)
        for parameter in told:
            if parameter["name"] == self.page_size_query_param:
                parameter["schema"]["minimum"] = 1
                parameter["description"] = f"at most {self.max_page_size} are given"
        return told

    def decode_cursor(self, request):
        """DRF takes the position in a cursor as it comes; a made-up one would fail in the
        database.
        """
        cursor = super().decode_cursor(request)
        if (
            cursor is not None
            and cursor.position is not None
            and whole_number(cursor.position) is None
        ):
            raise exceptions.NotFound(self.invalid_cursor_message)
        return cursor


class RunSerializer(serializers.ModelSerializer):
    """What every run has in common; the apps add their own fields."""

    owner = serializers.CharField(source="owner.username", read_only=True)
    progress = serializers.SerializerMethodField(help_text="0 to 1")
    queue_position = serializers.IntegerField(read_only=True, allow_null=True)
    seconds = serializers.FloatField(read_only=True, allow_null=True)

    class Meta:
        model = Run
        fields = [
            "id",
            "name",
            "owner",
            "status",
            "phase",
            "progress",
            "queue_position",
            "attempt",
            "error",
            "recipe",
            "created_at",
            "started_at",
            "finished_at",
            "seconds",
        ]
        read_only_fields = fields

    def get_progress(self, run) -> float:
        return round(run.progress / run.total, 4) if run.total else 0.0
