"""POST /: what ChatGLM-6B's api.py answered, so that its clients and tutorials work with one more
header, the key.

`{"prompt", "history"?, "max_length"?, "top_p"?, "temperature"?, "model"?,
"prefix_strength"?}` -> `{"response",
"history", "status", "time"}`. As there, a value that is false in Python (0, "", null) means its
default (or what the checkpoint wishes), and max_length counts prompt and answer together.
"""

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import ValidationError
from django.http import HttpResponseBase, JsonResponse
from django.utils import timezone
from django.utils.translation import gettext as _
from django.views.decorators.csrf import csrf_exempt

from chat import registry
from chat.api import completion, errors
from chat.api.openai import body_of
from chat.conversations.messages import without_history
from chat.engine.thoughts import apart
from chat.models import Checkpoint
from chat.sampling import number_problem
from portal.models import ApiKey
from portal.rest.api_keys import KeyRefused, check_key, user_of_request
from portal.rest.conventions import READABLE, json_error
from portal.text import check_content, is_storable

PARAMETERS = ("max_length", "top_p", "temperature")
OWN_PARAMETERS = ("prefix_strength",)  # where a 0 means 0
MAX_LENGTH = 2048  # unless the request has another; the rest is as everywhere


@csrf_exempt
@login_not_required
async def answer_to_key(request, key: str) -> HttpResponseBase:
    """POST /key/KEY/, for clients that can set neither a header nor a name in their address; only
    with PORTAL_KEY_IN_ADDRESS.
    """
    if not settings.KEY_IN_ADDRESS:
        return json_error(404, _("Not found."), code="not_found")
    if request.method != "POST":
        return json_error(405, _("Use %(method)s.") % {"method": "POST"}, headers={"Allow": "POST"})
    return await _answer(request, await sync_to_async(ApiKey.user_of)(key))


@csrf_exempt
@login_not_required
async def answer(request) -> HttpResponseBase:
    return await _answer(request, await user_of_request(request))


async def _answer(request, user) -> HttpResponseBase:
    if user is None:
        return errors.no_key(request)
    name = ""
    try:
        await sync_to_async(check_key)(user, "chat")
        body = await body_of(request)
        messages, sampling = _wanted(body)
        name = body.get("model") or ""
        checkpoint, adapter = await sync_to_async(_model)(user, name)
        requests = completion.requests_of(
            user, checkpoint, adapter, messages, [{"max_length": MAX_LENGTH, **sampling}]
        )
        (answered,) = await completion.collect(checkpoint, requests, user)
    except KeyRefused as refusal:
        return errors.key_refused(refusal)
    except LookupError:
        return errors.no_such_model(name)
    except errors.REFUSALS as error:
        return errors.response_of(error)
    text = apart(answered.text)[1]  # the protocol has no place for thoughts
    return JsonResponse(
        {
            "response": text,
            "history": [*(body.get("history") or []), [body["prompt"], text]],
            "status": 200,
            "time": timezone.localtime().strftime("%Y-%m-%d %H:%M:%S"),
        },
        json_dumps_params=READABLE,
    )


def _model(user, name: str):
    if name:
        return registry.find_model(user, name)
    checkpoint = Checkpoint.default()
    if checkpoint is None:
        message = _(
            "There is no checkpoint yet. Register one with: python manage.py add_checkpoint PATH"
        )
        raise ValidationError({"model": ValidationError(message, "no_checkpoint")})
    return checkpoint, None


def _wanted(body) -> tuple[list[dict], dict]:
    """(messages, sampling); ValidationError({field: ...}) with every problem."""
    if not isinstance(body, dict):
        raise ValidationError(
            {"__all__": ValidationError(_("The body must be a JSON object."), "invalid_json")}
        )
    problems = {}
    prompt, history = body.get("prompt"), body.get("history") or []
    if not isinstance(prompt, str) or not prompt.strip():
        problems["prompt"] = ValidationError(_("Write something first."), "blank")
    else:
        try:
            check_content(prompt)
        except ValidationError as error:
            problems["prompt"] = error
    if not isinstance(history, list) or not all(_is_round(turn) for turn in history):
        problems["history"] = ValidationError(
            _("The history is a list of [question, answer]."), "invalid_value"
        )
        history = []
    if body.get("model") and not isinstance(body["model"], str):
        problems["model"] = ValidationError(_("Must be a text."), "invalid_value")
    values = {name: body[name] for name in PARAMETERS if body.get(name)}
    values |= {name: body[name] for name in OWN_PARAMETERS if body.get(name) is not None}
    for name, value in values.items():
        problem = number_problem(name, value)
        if problem:
            problems[name] = ValidationError(problem, "invalid_value")
    with_history = body.get("with_history", True)
    if not isinstance(with_history, bool):
        problems["with_history"] = ValidationError(_("Must be true or false."), "invalid_value")
    if problems:
        raise ValidationError(problems)
    messages = [
        {"role": role, "content": content}
        for turn in history
        for role, content in zip(("user", "assistant"), (turn[0] or "", turn[1]), strict=True)
    ]
    messages.append({"role": "user", "content": prompt})
    return messages if with_history else without_history(messages), values


def _is_round(turn) -> bool:
    """[question, answer]; LangChain's ChatGLM keeps the answers alone, as [null, answer]."""
    return (
        isinstance(turn, list)
        and len(turn) == 2
        and all(isinstance(text, str) and is_storable(text) for text in (turn[0] or "", turn[1]))
    )
