"""POST /v1/responses, for text and calls of functions: OpenAI's newer interface onto the same
answers. Nothing is stored, so `previous_response_id` names nothing here.
"""

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from asgiref.sync import sync_to_async
from django.core.exceptions import ValidationError
from django.http import HttpResponseBase, JsonResponse
from django.utils.translation import gettext as _

from chat import registry
from chat.api import completion, errors, sse
from chat.api.completion import CollectedCompletion
from chat.api.openai import body_of, for_scripts
from chat.api.openai_items import Items, as_messages
from chat.api.openai_messages import turns_of
from chat.api.openai_request import Body
from chat.api.openai_tools import Offered, offered
from portal.logins import login_of
from portal.rest.conventions import READABLE

UNSUPPORTED = ("previous_response_id", "conversation", "prompt")


@dataclass(frozen=True)
class Wanted:
    model: str
    messages: list[dict]  # turns of a chat.engine.request.Request
    sampling: dict
    stream: bool
    offered: Offered  # the tools
    fields: dict  # the body, parts of which the answer repeats


def wanted_of(fields) -> Wanted:
    """ValidationError({param: ...}) naming every problem of the body."""
    body = Body.of(fields)
    tools = offered(body)
    body.neutral()
    for param in UNSUPPORTED:
        if body.get(param):
            body.unsupported(param)
    if body.flag("background"):
        body.unsupported("background")
    model, instructions = body.model(), body.get("instructions")
    messages = turns_of(as_messages(body.get("input")), body.refuse, "input")
    if instructions is not None and not isinstance(instructions, str):
        body.refuse("instructions", _("Must be a text."))
    elif instructions:
        messages = [{"role": "system", "content": instructions}, *messages]
    text = body.get("text")
    wished = text.get("format") if isinstance(text, dict) else None
    (sampling,) = body.samplings()[:1]
    sampling = {**sampling, "json_schema": body.json_schema("text.format", wished)}
    stream = body.flag("stream")
    body.check()
    return Wanted(model, messages, sampling, stream, tools, fields)


@for_scripts("POST")
async def responses(request, user) -> HttpResponseBase:
    """POST /v1/responses"""
    try:
        wanted = wanted_of(await body_of(request))
        checkpoint, adapter = await sync_to_async(registry.find_model)(user, wanted.model)
    except ValidationError as error:
        return errors.response_of(error)
    except LookupError:
        return errors.no_such_model(wanted.model)
    requests = completion.requests_of(
        user, checkpoint, adapter, wanted.messages, [wanted.sampling], wanted.offered
    )
    told = Told(wanted)
    try:
        if wanted.stream:
            events = completion.stream(checkpoint, requests, user)
            first = await anext(events)  # a refusal still has its HTTP status
            return sse.response(_events(told, first, events), login_of(user))
        (answer,) = await completion.collect(checkpoint, requests, user)
    except errors.REFUSALS as error:
        return errors.response_of(error)
    return JsonResponse(told.whole(answer), json_dumps_params=READABLE)


class Told:
    """One answer in the words of this interface."""

    def __init__(self, wanted: Wanted):
        self.wanted = wanted
        self.id, self.items = f"resp_{uuid.uuid4().hex}", Items(wanted.offered)
        self.created = int(time.time())
        self._number = -1

    def whole(self, answer: CollectedCompletion) -> dict:
        for _event in (*self.items.feed(answer.text), *self.items.end(status_of(answer))):
            pass
        return self.response(answer)

    def response(self, answer: CollectedCompletion | None = None, error: dict | None = None):
        """The response object: under way without an answer, failed with an error."""
        fields = self.wanted.fields
        status = "failed" if error else status_of(answer) if answer else "in_progress"
        cut = status == "incomplete"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": error and {"code": "server_error", "message": error["message"]},
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": fields.get("instructions"),
            "max_output_tokens": fields.get("max_output_tokens"),
            "model": self.wanted.model,
            "output": self.items.output(status) if answer else [],
            "parallel_tool_calls": fields.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": fields.get("temperature"),
            "text": fields.get("text") or {"format": {"type": "text"}},
            "tool_choice": fields.get("tool_choice") or "auto",
            "tools": fields.get("tools") or [],
            "top_p": fields.get("top_p"),
            "truncation": "disabled",
            "usage": answer and _usage(answer.usage),
            "metadata": fields.get("metadata") or {},
        }

    def event(self, kind: str, **fields) -> str:
        self._number += 1
        payload = {"type": kind, "sequence_number": self._number, **fields}
        return f"event: {kind}\n{sse.data(payload)}"


def status_of(answer: CollectedCompletion) -> str:
    return "incomplete" if answer.finish_reason == "length" else "completed"


def _usage(usage: dict) -> dict:
    counts = {
        "input_tokens": usage.get("prompt_tokens", 0),
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage.get("completion_tokens", 0),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.get("total_tokens", 0),
    }
    return {**counts, **({"max_tokens": usage["max_tokens"]} if "max_tokens" in usage else {})}


async def _events(told: Told, first, events) -> AsyncGenerator[str, None]:
    answer = CollectedCompletion()
    try:
        yield told.event("response.created", response=told.response())
        yield told.event("response.in_progress", response=told.response())
        async for _index, event in completion.resumed(first, events, [answer]):
            if event.type == "loading":
                yield sse.loading(event)
            elif event.type == "delta":
                for kind, fields in told.items.feed(event.data["text"]):
                    yield told.event(kind, **fields)
        for kind, fields in told.items.end(status_of(answer)):
            yield told.event(kind, **fields)
        response = told.response(answer)
        yield told.event(f"response.{response['status']}", response=response)
    except errors.REFUSALS as error:  # the status line has gone out long ago
        failed = told.response(error=errors.object_of(error))
        yield told.event("response.failed", response=failed)
    finally:
        await events.aclose()
