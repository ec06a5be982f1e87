"""/v1/: what OpenAI's clients expect. Every checkpoint and every adapter is a model. No
conversation is kept.
"""

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncGenerator

from asgiref.sync import sync_to_async
from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import RequestDataTooBig, ValidationError
from django.http import Http404, HttpResponseBase, JsonResponse
from django.utils.translation import gettext as _
from django.views.decorators.csrf import csrf_exempt
from rest_framework import exceptions

from chat import registry
from chat.api import completion, errors, sse
from chat.api.completion import CollectedCompletion
from chat.api.openai_request import ChatRequest, chat_request
from chat.api.openai_tools import Answer
from chat.engine.request import Request
from chat.models import Adapter, Checkpoint
from portal.logins import login_of
from portal.rest.api_keys import KeyRefused, check_key, user_of_request
from portal.rest.conventions import READABLE, json_error
from portal.rest.json_bodies import json_of, why_not_json

OWNED_BY = "portal"


LARGE = 64 * 1024  # bytes of JSON that take the event loop longer than changing the thread does


async def body_of(request):
    """The parsed JSON body; ValidationError when there is none."""
    if int(request.META.get("CONTENT_LENGTH") or 0) < LARGE:
        return parsed_body(request)
    return await asyncio.to_thread(parsed_body, request)


def parsed_body(request):
    """`body_of` for a view that runs on a thread already."""
    try:
        return json_of(request.body)
    except RequestDataTooBig:
        raise ValidationError(
            {"__all__": ValidationError(_("The body is too large."), "too_large")}
        ) from None
    except ValueError as error:
        raise ValidationError({"__all__": ValidationError(*why_not_json(error))}) from None


def for_scripts(*methods: str, scope: str = "chat"):
    """Decorates `view(request, user, ...)`: keys only, these methods only; all else is refused in
    OpenAI's envelope.
    """

    def decorated(view):
        @csrf_exempt  # a browser does not send a key by itself
        @login_not_required
        @functools.wraps(view)
        async def door(request, **parts) -> HttpResponseBase:
            user = await user_of_request(request)
            if user is None:
                return errors.no_key(request)
            if request.method not in methods:
                message = _("Use %(method)s.") % {"method": methods[0]}
                return json_error(
                    405, message, code="method_not_allowed", headers={"Allow": ", ".join(methods)}
                )
            try:
                await sync_to_async(check_key)(user, scope)
            except KeyRefused as refusal:
                return errors.key_refused(refusal)
            return await view(request, user, **parts)

        return door

    return decorated


def for_scripts_in_thread(*methods: str, scope: str):
    """The same for a view that asks the database: it runs on a thread, and what it raises is told
    in OpenAI's envelope.
    """

    def decorated(view):
        @functools.wraps(view)
        def told(request, user, **parts) -> HttpResponseBase:
            try:
                return view(request, user, **parts)
            except Http404:
                return json_error(404, _("Not found."), code="not_found")
            except ValidationError as error:
                return errors.response_of(error)
            except exceptions.APIException as error:
                code = error.get_codes()
                message = str(error.detail)
                return json_error(error.status_code, message, code=str(code))

        @for_scripts(*methods, scope=scope)
        @functools.wraps(view)
        async def door(request, user, **parts) -> HttpResponseBase:
            return await sync_to_async(told)(request, user, **parts)

        return door

    return decorated


@for_scripts("POST")
async def chat_completions(request, user) -> HttpResponseBase:
    """POST /v1/chat/completions"""
    try:
        wanted = chat_request(await body_of(request))
        checkpoint, adapter = await sync_to_async(registry.find_model)(user, wanted.model)
    except ValidationError as error:
        return errors.response_of(error)
    except LookupError:
        return errors.no_such_model(wanted.model)
    requests = asked(user, checkpoint, adapter, wanted)
    try:
        if wanted.stream:
            events = completion.stream(checkpoint, requests, user)
            first = await anext(events)  # a refusal still has its HTTP status
            return sse.response(_chunks(wanted, first, events), login_of(user))
        answers = await completion.collect(checkpoint, requests, user)
    except errors.REFUSALS as error:
        return errors.response_of(error)
    return JsonResponse(answered(wanted, answers), json_dumps_params=READABLE)


def asked(
    user, checkpoint: Checkpoint, adapter: Adapter | None, wanted: ChatRequest
) -> list[Request]:
    """One for each choice."""
    return completion.requests_of(
        user, checkpoint, adapter, wanted.messages, wanted.samplings, wanted.offered
    )


def answered(wanted: ChatRequest, answers: list[CollectedCompletion]) -> dict:
    """The body of the answers to `asked`."""
    return {
        **_head(wanted, "chat.completion"),
        "choices": [_choice(index, answer, wanted) for index, answer in enumerate(answers)],
        "usage": usage_of(answers),
    }


def _head(wanted: ChatRequest, kind: str) -> dict:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": wanted.model,
        "object": kind,
    }


def _choice(index: int, answer: CollectedCompletion, wanted: ChatRequest) -> dict:
    told = Answer(wanted.offered).whole(answer.text)
    return {
        "index": index,
        "message": told.message(),
        "logprobs": _logprobs(answer.logprobs, wanted),
        "finish_reason": told.finish_reason(answer.finish_reason),
    }


def _logprobs(entries: list | None, wanted: ChatRequest) -> dict | None:
    return (
        None
        if wanted.samplings[0]["logprobs"] is None
        else {"content": entries or [], "refusal": None}
    )


def usage_of(answers: list[CollectedCompletion], prompts: int = 1) -> dict:
    """Each prompt counts once, as OpenAI counts it; the answers add up. answers: as many to each
    of the prompts.
    """
    counted = [answer.usage.get("prompt_tokens", 0) for answer in answers]
    several = len(answers) // prompts
    prompt = sum(max(counted[i : i + several]) for i in range(0, len(counted), several))
    written = sum(answer.usage.get("completion_tokens", 0) for answer in answers)
    counts = {"prompt_tokens": prompt, "completion_tokens": written}
    counts["total_tokens"] = prompt + written
    room = [answer.usage["max_tokens"] for answer in answers if "max_tokens" in answer.usage]
    return {**counts, **({"max_tokens": min(room)} if room else {})}


async def _chunks(wanted: ChatRequest, first, events) -> AsyncGenerator[str, None]:
    head = _head(wanted, "chat.completion.chunk")
    answers = [CollectedCompletion() for _sampling in wanted.samplings]
    told = [Answer(wanted.offered) for _sampling in wanted.samplings]

    def chunk(
        index: int, delta: dict, finish_reason: str | None = None, entries: list | None = None
    ) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
        choice["logprobs"] = _logprobs(entries, wanted) if entries else None
        payload = {**head, "choices": [choice]}
        if wanted.include_usage:
            payload["usage"] = None
        return sse.data(payload)

    try:
        for index in range(len(answers)):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, event in completion.resumed(first, events, answers):
            if event.type == "loading":
                yield sse.loading(event)
            elif event.type == "delta":
                entries = event.data.get("logprobs")
                for piece in told[index].feed(event.data["text"]):
                    yield chunk(index, told[index].delta(piece), entries=entries)
                    entries = None
                if entries:
                    yield chunk(index, {}, entries=entries)
            elif event.type == "finished":
                for piece in told[index].flush():
                    yield chunk(index, told[index].delta(piece))
                yield chunk(index, {}, told[index].finish_reason(answers[index].finish_reason))
        if wanted.include_usage:
            yield sse.data({**head, "choices": [], "usage": usage_of(answers)})
    except errors.REFUSALS as error:  # the status line has gone out long ago
        yield sse.data({"error": errors.object_of(error)})
    finally:
        await events.aclose()
    yield "data: [DONE]\n\n"


@for_scripts("GET", "HEAD")
async def models(request, user):
    """GET /v1/models"""
    return JsonResponse({"object": "list", "data": await sync_to_async(_listed)(user)})


def _listed(user) -> list[dict]:
    adapters = Adapter.objects.visible_to(user).select_related("checkpoint")
    return [
        *(_model(checkpoint, None) for checkpoint in Checkpoint.objects.visible_to(user)),
        *(_model(adapter.checkpoint, adapter) for adapter in adapters),
    ]


def _model(checkpoint: Checkpoint, adapter: Adapter | None) -> dict:
    row = adapter or checkpoint
    return {
        "id": row.name,
        "object": "model",
        "created": int(row.created_at.timestamp()),
        "owned_by": OWNED_BY,
        "root": checkpoint.name,
        "parent": checkpoint.name if adapter else None,
        "with_history": adapter.with_history if adapter else True,
    }


@for_scripts("GET", "HEAD")
async def model(request, user, name: str):
    """GET /v1/models/{id}; names may contain slashes."""
    try:
        checkpoint, adapter = await sync_to_async(registry.find_model)(user, name)
    except ValidationError as error:
        return errors.response_of(error)
    except LookupError:
        return errors.no_such_model(name)
    return JsonResponse({**_model(checkpoint, adapter), "id": name})
