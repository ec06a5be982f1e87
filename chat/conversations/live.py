"""Answers in flight: each is taken from the worker, written down, and handed to whoever reads
along.

All of it happens on one event loop on a thread of its own (chat/conversations/loop.py), started
with the first answer, so that an answer does not depend on the request, the websocket or the page
that asked for it. Tokens pass no channel layer. The row is saved about once a second and at the
end, before readers are told of the end; after a restart of the web process the worker's log is
replayed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any

from asgiref.sync import async_to_sync, sync_to_async
from django.db import DatabaseError
from django.utils import timezone

from chat.conversations.frames import ENDINGS, LiveAnswer, Reader, View
from chat.conversations.loop import GenerationLoop, current, forget, on_loop
from chat.conversations.streaming import SMALL
from chat.models import Conversation, Message

logger = logging.getLogger(__name__)

KEEP_DELETED = timedelta(days=1)
FRAME_INTERVAL = 0.05  # seconds between two frames of an answer to one reader


async def start(message: Message) -> None:
    """Has the queued answer `message` written, from its conversation's history. Returns when a
    worker has taken it, where it may wait for its model to be loaded.

    GenerationRefused: nobody took it; the row is saved as failed with the error.
    """
    await on_loop(GenerationLoop.begin, message)


async def follow(
    message_id: int, after: int = 0, rendered: bool = False
) -> AsyncGenerator[dict[str, Any], None]:
    """The answer's frames after number `after` (docs/api.md, "Websocket"), up to its end; any
    number of readers at once. `rendered`: with `message.rendered` among them.
    """
    answer = await _answer(message_id)
    if answer is None:
        return
    reader = Reader()
    answer.readers.add(reader)
    view = View() if rendered else None
    try:
        while True:
            reader.listen()
            if view is not None and not answer.ended:
                await _grow(answer)
            frames = answer.frames(after, view)
            for frame in frames:
                after = frame["seq"]
                yield frame
                if frame["type"] in ENDINGS:
                    return
            if frames:
                await asyncio.sleep(FRAME_INTERVAL)
            else:
                await reader.wait()
    finally:
        answer.readers.discard(reader)


async def _grow(answer: LiveAnswer) -> None:
    """Renders what has ended, once for all readers; much of it beside the event loop."""
    content, rendered = answer.content, answer.rendered
    if rendered.has_news(content):
        if len(content) - rendered.text_from > SMALL:
            await asyncio.to_thread(rendered.grow, content)
        else:
            rendered.grow(content)


async def stop(message_id: int) -> None:
    """Ends the answer; what was written stays. Waits a little, so that the row usually says so
    afterwards.
    """
    answer = await _answer(message_id)
    if answer is not None and not answer.ended:
        await on_loop(GenerationLoop.stop, answer)


async def recover() -> int:
    """Takes up the answers in flight that this process does not follow: after a restart of the web.
    Returns how many.
    """
    rows = await sync_to_async(lambda: list(Message.objects.filter(status__in=Message.IN_FLIGHT)))()
    for row in rows:
        await on_loop(GenerationLoop.resume, row)
    return len(rows)


def discard(conversation: Conversation) -> None:
    """Deletes a conversation for good; answers in flight are stopped first, so that the model does
    not write for nobody. Sync.
    """
    _stop_all(conversation)
    conversation.delete()


def put_away(conversation: Conversation) -> None:
    """Deletes a conversation so that it can be taken back for KEEP_DELETED; what was deleted before
    that goes for good. Sync.
    """
    _stop_all(conversation)
    now = timezone.now()
    Conversation.objects.filter(pk=conversation.pk).update(deleted_at=now)
    for old in Conversation.objects.filter(deleted_at__lt=now - KEEP_DELETED):
        discard(old)


def _stop_all(conversation: Conversation) -> None:
    for message in conversation.messages.filter(status__in=Message.IN_FLIGHT):
        async_to_sync(stop)(message.pk)


def recover_in_background() -> None:
    """`recover`, without waiting; for the start of a web process."""

    async def work():
        try:
            await recover()
        except DatabaseError:
            logger.exception("answers in flight could not be taken up")

    current().run(work())


async def _answer(message_id: int) -> LiveAnswer | None:
    """The answer in flight, or what its row says; None when there is no such row."""
    answer = current().answers.get(message_id)
    if answer is not None:
        return answer
    row = await sync_to_async(
        Message.objects.filter(pk=message_id, role=Message.Role.ASSISTANT).first
    )()
    if row is None:
        return None
    if row.is_in_flight:
        return await on_loop(GenerationLoop.resume, row)
    return await sync_to_async(LiveAnswer.of_row)(row)


def quiesce(timeout: float = 15) -> None:
    """For tests: returns when no answer is in flight and all rows are written; TimeoutError."""
    current().run(current().quiesce()).result(timeout)


def restart() -> None:
    """For tests: as if this web process had ended and a new one been started."""
    forget()
