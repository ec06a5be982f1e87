"""POST /v1/completions: a text, or tokens, gone on with as they stand, without a chat template."""

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from asgiref.sync import sync_to_async
from django.core.exceptions import ValidationError
from django.http import HttpResponseBase, JsonResponse
from django.utils.translation import gettext as _

from chat import registry
from chat.api import completion, errors, sse
from chat.api.completion import CollectedCompletion
from chat.api.openai import body_of, for_scripts, usage_of
from chat.api.openai_request import MOST_CHOICES, Body
from chat.engine.request import Request
from chat.models import Adapter, Checkpoint
from portal.logins import login_of
from portal.rest.conventions import READABLE
from portal.text import is_storable

MOST_TOKENS = 1_000_000  # of a prompt that is sent as token ids


@dataclass(frozen=True)
class Wanted:
    model: str
    # {"text"} or {"prompt_ids"} of chat.engine.request.Request
    prompts: list[dict]
    samplings: list[dict]  # of each prompt
    stream: bool
    include_usage: bool
    echo: bool


def wanted_of(fields) -> Wanted:
    """ValidationError({param: ...}) naming every problem of the body."""
    body = Body.of(fields)
    body.neutral()
    model, prompts, echo = body.model(), _prompts(body), body.flag("echo")
    logprobs = body.whole("logprobs", 0, 20, None)
    samplings = [{**each, "logprobs": logprobs} for each in body.samplings()]
    if len(prompts) * len(samplings) > MOST_CHOICES:
        message = _("At most %(most)s answers at once: prompts times n.")
        body.refuse("prompt", message % {"most": MOST_CHOICES})
    if body.get("suffix"):
        body.unsupported("suffix")
    if body.get("best_of") not in (None, len(samplings)):
        body.unsupported("best_of")
    if echo and (logprobs is not None or any("text" not in prompt for prompt in prompts)):
        body.unsupported("echo")
    stream, include_usage = body.stream()
    body.check()
    return Wanted(model, prompts, samplings, stream, include_usage, echo)


def _prompts(body: Body) -> list[dict]:
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and not all(type(part) is int for part in prompt)
    prompts = [
        {"text": one}
        if isinstance(one, str) and one and is_storable(one)
        else {"prompt_ids": tuple(one)}
        if isinstance(one, list)
        and 0 < len(one) <= MOST_TOKENS
        and all(type(token) is int and 0 <= token < 2**31 for token in one)
        else None
        for one in (prompt if several else [prompt])
    ]
    if None in prompts:
        body.refuse("prompt", _("Must be a text, a list of token ids, or a list of those."))
        return []
    return [each for each in prompts if each is not None]


@for_scripts("POST")
async def completions(request, user) -> HttpResponseBase:
    """POST /v1/completions"""
    try:
        wanted = wanted_of(await body_of(request))
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


def asked(user, checkpoint: Checkpoint, adapter: Adapter | None, wanted: Wanted) -> list[Request]:
    """One for each choice of each prompt."""
    return [
        replace(each, **prompt)
        for prompt in wanted.prompts
        for each in completion.requests_of(user, checkpoint, adapter, [], wanted.samplings)
    ]


def answered(wanted: Wanted, answers: list[CollectedCompletion]) -> dict:
    """The body of the answers to `asked`."""
    choices = [
        {
            "index": index,
            "text": echo + answer.text,
            "logprobs": _logprobs(answer.logprobs, wanted),
            "finish_reason": answer.finish_reason,
        }
        for index, (echo, answer) in enumerate(zip(_echoes(wanted), answers, strict=True))
    ]
    usage = usage_of(answers, len(wanted.prompts))
    return {**_head(wanted), "choices": choices, "usage": usage}


def _echoes(wanted: Wanted) -> list[str]:
    """What stands before the text of each choice."""
    texts = [prompt.get("text", "") if wanted.echo else "" for prompt in wanted.prompts]
    return [text for text in texts for _sampling in wanted.samplings]


def _head(wanted: Wanted) -> dict:
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": wanted.model,
    }


async def _chunks(wanted: Wanted, first, events) -> AsyncGenerator[str, None]:
    head, echoes = _head(wanted), _echoes(wanted)
    answers = [CollectedCompletion() for _echo in echoes]

    def chunk(index: int, text: str, finish_reason: str | None = None, logprobs=None) -> str:
        choice = {"index": index, "text": text, "finish_reason": finish_reason}
        choice["logprobs"] = _logprobs(logprobs, wanted) if logprobs else None
        payload = {**head, "choices": [choice]}
        if wanted.include_usage:
            payload["usage"] = None
        return sse.data(payload)

    try:
        for index, echo in enumerate(echoes):
            if echo:
                yield chunk(index, echo)
        async for index, event in completion.resumed(first, events, answers):
            if event.type == "loading":
                yield sse.loading(event)
            elif event.type == "delta":
                yield chunk(index, event.data["text"], logprobs=event.data.get("logprobs"))
            elif event.type == "finished":
                yield chunk(index, "", answers[index].finish_reason)
        if wanted.include_usage:
            usage = usage_of(answers, len(wanted.prompts))
            yield sse.data({**head, "choices": [], "usage": usage})
    except errors.REFUSALS as error:  # the status line has gone out long ago
        yield sse.data({"error": errors.object_of(error)})
    finally:
        await events.aclose()
    yield "data: [DONE]\n\n"


def _logprobs(entries: list, wanted: Wanted) -> dict | None:
    """The four lists that this interface has in place of the chat's one."""
    if wanted.samplings[0]["logprobs"] is None:
        return None
    offsets, at = [], 0
    for entry in entries:
        offsets.append(at)
        at += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries
        ],
        "text_offset": offsets,
    }
