"""Answers for scripts, outside any conversation: straight from the worker to the client that waits
for them.

When that client leaves, the generation is aborted: nobody else can read it.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

from asgiref.sync import sync_to_async
from django.utils.translation import gettext as _

from chat.api.openai_tools import NO_TOOLS, Offered
from chat.conversations.turns import model_label
from chat.engine.request import Event, Request, interrupted
from chat.models import Adapter, Checkpoint
from chat.sampling import as_sampling
from chat.worker import router
from chat.worker.router import coalesced
from portal.budget import tokens
from portal.logins import ended, login_of
from portal.models import TokenUsage, User
from portal.rest.conventions import error

FRAME_INTERVAL = 0.05  # seconds between two deltas to one client; the first one goes out at once


def requests_of(
    user,
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    messages: list[dict],
    samplings: list[dict],
    offered: Offered = NO_TOOLS,
) -> list[Request]:
    """One request per sampling (checked values, see chat/sampling.py), all with the same prompt."""
    reference = adapter.ref() if adapter else None
    return [
        Request(
            uuid.uuid4().hex,
            messages=tuple(messages),
            adapter=reference,
            sampling=as_sampling(sampling, checkpoint.sampling),
            user=str(user.pk),
            tools=offered.tools,
            must_call=offered.must_call,
        )
        for sampling in samplings
    ]


async def stream(
    checkpoint: Checkpoint, requests: list[Request], user: User
) -> AsyncGenerator[tuple[int, Event], None]:
    """(index of the request, event) in the order of arrival, until all have ended; deltas that came
    together are one.

    OverBudget before anything is begun (portal/budget/tokens.py), RequestRefused or
    WorkerUnavailable before the first event when the worker takes none of them or goes away.
    LoginOver when the user's key ends (portal/logins.py), before or after it.
    """
    await sync_to_async(tokens.check)(user.pk)
    workers = router.get_router()
    needed = checkpoint.ref()
    arrived: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

    async def watch() -> None:
        await ended(login_of(user))
        arrived.put_nowait((0, LoginOver()))

    async def read(index: int, request: Request) -> None:
        try:
            async for handful in workers.events(request.id):
                for event in handful:
                    arrived.put_nowait((index, event))
        except Exception as error:
            arrived.put_nowait((index, error))

    running: list[Request] = []  # what must be aborted when the client leaves
    readers: list[asyncio.Task] = []
    left = len(requests)
    prompt = written = 0  # tokens, which the user's key pays for
    watching = asyncio.create_task(watch())
    try:
        for request in requests:
            running.append(request)
            try:
                await workers.submit(request, needed)
            except Exception:
                running.remove(request)
                raise
        readers = [
            asyncio.create_task(read(index, request)) for index, request in enumerate(requests)
        ]
        while left:
            news = [await arrived.get()]
            while not arrived.empty():
                news.append(arrived.get_nowait())
            for index, event in _joined(news):
                if isinstance(event, Exception):
                    raise event
                left -= event.terminal
                prompt = max(prompt, event.data.get("prompt_tokens") or 0)
                written += event.data.get("tokens") or 0
                yield index, event
            if left and any(
                isinstance(event, Event) and event.type == "delta" for _index, event in news
            ):
                await asyncio.sleep(FRAME_INTERVAL)
    except router.WorkerUnavailable:
        running.clear()  # nobody there to tell
        raise
    finally:
        for reader in [watching, *readers]:
            reader.cancel()
        key = getattr(user, "api_key", None)
        if key is not None and key.tokens_per_day is not None and prompt + written:
            await asyncio.shield(sync_to_async(key.spend)(prompt + written))
        if prompt + written:
            await asyncio.shield(
                sync_to_async(_count)(user.pk, checkpoint, requests[0], prompt, written)
            )
        if left:
            await asyncio.shield(
                asyncio.gather(*(workers.abort(r.id) for r in running), return_exceptions=True)
            )


def _count(user_id: int, checkpoint: Checkpoint, request: Request, prompt: int, written: int):
    adapter = None
    if request.adapter is not None:
        adapter = Adapter.objects.filter(
            checkpoint=checkpoint.pk, sha256=request.adapter.name
        ).first()
    label = model_label(checkpoint, adapter)
    tokens.count(user_id, str(TokenUsage.Door.API), label, prompt, written)


def _joined(news: list[tuple[int, Event | Exception]]) -> Iterator[tuple[int, Event | Exception]]:
    """Each request's events in their order, neighbouring deltas as one; errors last."""
    by_request: dict[int, list[Event]] = {}
    for index, event in news:
        if isinstance(event, Event):
            by_request.setdefault(index, []).append(event)
    for index, events in by_request.items():
        yield from ((index, event) for event in coalesced(events))
    yield from ((index, event) for index, event in news if isinstance(event, Exception))


@dataclass
class CollectedCompletion:
    """One request's answer, collected."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict = field(default_factory=dict)
    timings: dict = field(default_factory=dict)
    logprobs: list = field(default_factory=list)


class GenerationFailed(Exception):
    """The worker ended a sequence with an error; `error` is OpenAI's error object."""

    def __init__(self, error: dict):
        super().__init__(error.get("message"))
        self.error = error


class LoginOver(GenerationFailed):
    """The key was revoked, or its owner's account closed, while the answer was written."""

    def __init__(self):
        message = _("The API key is unknown or has been revoked.")
        super().__init__(
            error(message, type="authentication_error", code="invalid_api_key")["error"]
        )


async def collect(
    checkpoint: Checkpoint, requests: list[Request], user: User
) -> list[CollectedCompletion]:
    """The whole answers; RequestRefused, WorkerUnavailable or GenerationFailed."""
    answers = [CollectedCompletion() for _request in requests]
    events = stream(checkpoint, requests, user)
    try:
        async for index, event in events:
            take(answers[index], event)
    finally:
        await events.aclose()
    return answers


async def resumed(
    first: tuple[int, Event],
    events: AsyncGenerator[tuple[int, Event], None],
    answers: list[CollectedCompletion],
) -> AsyncGenerator[tuple[int, Event], None]:
    """`first` and the rest of a `stream`; each event is added to its answer, but for the text and
    its logprobs, which the caller sends on.
    """
    index, event = first
    while True:
        take(answers[index], event)
        answers[index].text, answers[index].logprobs = "", []
        yield index, event
        try:
            index, event = await anext(events)
        except StopAsyncIteration:
            return


def take(answer: CollectedCompletion, event: Event) -> None:
    """Adds an event to the answer it belongs to."""
    if event.type == "delta":
        answer.text += event.data["text"]
        answer.logprobs += event.data.get("logprobs") or []
    elif event.type == "finished":
        answer.finish_reason = event.data["finish_reason"]
        answer.usage, answer.timings = (
            event.data.get("usage") or {},
            event.data.get("timings") or {},
        )
        if answer.finish_reason in ("abort", "error"):
            raise GenerationFailed(interrupted("the answer was interrupted"))
    elif event.type == "failed":
        raise GenerationFailed(event.data["error"])
