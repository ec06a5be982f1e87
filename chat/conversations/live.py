"""Answers in flight: each is taken from the worker, written down, and handed to whoever reads
along.

All of it happens on one event loop on a thread of its own, started with the first answer, so that
an answer does not depend on the request, the websocket or the page that asked for it. Tokens pass
no channel layer. The row is saved about once a second and at the end, before readers are told of
the end; after a restart of the web process the worker's log is replayed.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from asgiref.sync import async_to_sync, sync_to_async
from django.db import DatabaseError, close_old_connections, connections, transaction
from django.utils import timezone

from chat.conversations.frames import ENDINGS, Answer, Reader
from chat.conversations.rendering import to_html
from chat.engine.request import AdapterRef, Request, RequestRefused
from chat.models import Checkpoint, Conversation, Message
from chat.sampling import as_sampling
from chat.worker.router import CheckpointRef, Router, SequenceLost, WorkerUnavailable, get_router

logger = logging.getLogger(__name__)

FRAME_INTERVAL = 0.05  # seconds between two frames of an answer to one reader
SAVE_INTERVAL = 1.0
KEEP_ENDED = 10.0  # seconds that an ended answer stays in memory for readers on their way
NOT_YET_SUBMITTED = timedelta(seconds=15)  # age at which a row that no worker knows counts as lost
FIND_WORKER = 60.0  # seconds to wait for a worker that may still know a row's sequence
STOP_WAIT = 3.0  # seconds that `stop` waits for the end


async def start(message: Message) -> None:
    """Has the queued answer `message` written, from its conversation's history. Returns when a
    worker has taken it.

    WorkerUnavailable or RequestRefused: nobody took it; the row is saved as failed with the error.
    """
    try:
        await _at_home(_Home.begin, message.pk)
    except (WorkerUnavailable, RequestRefused) as error:
        answer = Answer(message.pk, str(message.sequence))
        answer.fail(error.as_error())
        await sync_to_async(_save_end)(answer)
        raise


async def follow(message_id: int, after: int = 0) -> AsyncIterator[dict[str, Any]]:
    """The answer's frames after number `after` (docs/api.md, "Websocket"), up to its end; any
    number of readers at once.
    """
    answer = await _answer(message_id)
    if answer is None:
        return
    reader = Reader()
    answer.readers.add(reader)
    try:
        while True:
            reader.listen()
            frames = answer.frames(after)
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


async def stop(message_id: int) -> None:
    """Ends the answer; what was written stays. Waits a little, so that the row usually says so
    afterwards.
    """
    answer = await _answer(message_id)
    if answer is not None and not answer.ended:
        await _at_home(_Home.stop, answer)


async def recover() -> int:
    """Takes up the answers in flight that this process does not follow: after a restart of the web.
    Returns how many.
    """
    rows = await sync_to_async(lambda: list(Message.objects.filter(status__in=Message.IN_FLIGHT)))()
    for row in rows:
        await _at_home(_Home.resume, row)
    return len(rows)


def discard(conversation: Conversation) -> None:
    """Deletes a conversation; answers in flight are stopped first, so that the model does not write
    for nobody. Sync.
    """
    for message in conversation.messages.filter(status__in=Message.IN_FLIGHT):
        async_to_sync(stop)(message.pk)
    conversation.delete()


def recover_in_background() -> None:
    """`recover`, without waiting; for the start of a web process."""

    async def work():
        try:
            await recover()
        except DatabaseError:
            logger.exception("answers in flight could not be taken up")

    _home().run(work())


async def _answer(message_id: int) -> Answer | None:
    """The answer in flight, or what its row says; None when there is no such row."""
    answer = _home().answers.get(message_id)
    if answer is not None:
        return answer
    row = await sync_to_async(
        Message.objects.filter(pk=message_id, role=Message.Role.ASSISTANT).first
    )()
    if row is None:
        return None
    if row.is_in_flight:
        return await _at_home(_Home.resume, row)
    return await sync_to_async(Answer.of_row)(row)


class _Home:
    """The event loop on its thread, what is in flight there, and the thread that reads and writes
    its rows.
    """

    def __init__(self):
        self.answers: dict[int, Answer] = {}
        self._changed: set[Answer] = set()
        self._rung: dict[asyncio.AbstractEventLoop, list[Reader]] = defaultdict(list)
        self._tasks: set[asyncio.Task] = set()
        self._done: dict[Answer, asyncio.Event] = {}
        self._database = ThreadPoolExecutor(1, thread_name_prefix="answers-database")
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self._live, name="answers", daemon=True).start()
        atexit.register(self._hang_up)

    def _hang_up(self) -> None:
        """At the end of the process. The worker goes on for its grace period; the next process
        takes the answers up again.
        """

        async def close():
            for task in tuple(self._tasks):
                task.cancel()  # first, or they would take the closed connection for a lost answer
            await get_router().close()

        with contextlib.suppress(Exception):
            self.run(close()).result(1.0)

    def _live(self) -> None:
        asyncio.set_event_loop(self.loop)
        self._keep(self._save_regularly())
        self.loop.run_forever()

    def run(self, work: Coroutine):
        """From any thread; a concurrent.futures.Future."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def _keep(self, work: Coroutine) -> None:
        # An empty context: the caller's request, its database thread and its language end long
        # before the answer.
        task = self.loop.create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- everything below runs on the loop

    async def begin(self, message_id: int) -> None:
        request, checkpoint = await self._in_database(_request_for, message_id)
        answer = self._enter(Answer(message_id, request.id))
        router = get_router()
        try:
            await router.submit(request, checkpoint)
        except BaseException as error:
            answer.fail(
                error.as_error()
                if isinstance(error, WorkerUnavailable | RequestRefused)
                else _fault(error)
            )
            self._leave(answer)
            raise
        self._keep(self._write_down(answer, router))

    async def resume(self, row: Message) -> Answer:
        answer = self.answers.get(row.pk)
        if answer is None:
            answer = self._enter(Answer.of_row(row))
            self._keep(self._write_down(answer, get_router(), created_at=row.created_at))
        return answer

    async def stop(self, answer: Answer) -> None:
        try:
            await get_router().abort(answer.sequence)
        except WorkerUnavailable as error:
            logger.info("message %s: nobody there to stop it (%s)", answer.message_id, error)
        done = self._done.get(answer)
        if done is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), STOP_WAIT)

    def _enter(self, answer: Answer) -> Answer:
        self.answers[answer.message_id] = answer
        self._done[answer] = asyncio.Event()
        return answer

    def _leave(self, answer: Answer) -> None:
        """The end: readers are told; latecomers find the answer here for a moment, then in its
        row.
        """
        answer.ended = True
        self._changed.discard(answer)
        self._ring(answer)
        self._done.pop(answer).set()
        self.loop.call_later(KEEP_ENDED, self.answers.pop, answer.message_id, None)

    async def _write_down(self, answer: Answer, router: Router, created_at=None) -> None:
        """Follows the sequence to its end. `created_at`: of a row that was begun by an earlier
        process, or by another one.
        """
        try:
            await self._read(answer, router, created_at)
        except WorkerUnavailable as error:
            answer.interrupt(error.message)
        except Exception as error:
            logger.exception("message %s: following its generation failed", answer.message_id)
            answer.fail(_fault(error))
        answer.html = await self.loop.run_in_executor(self._database, to_html, answer.content)
        await self._save(_save_end, answer)
        self._leave(answer)
        if not self._done:
            await self._save(connections.close_all)

    async def _read(self, answer: Answer, router: Router, created_at) -> None:
        begun = time.monotonic()
        while True:
            try:
                async with contextlib.aclosing(router.events(answer.sequence)) as handfuls:
                    async for events in handfuls:
                        created_at = None  # somebody knows it
                        for event in events:
                            answer.take(event)
                        if not events[-1].terminal:
                            self._changed.add(answer)
                            self._ring(answer)
                return
            except SequenceLost:
                if created_at is None or timezone.now() - created_at > NOT_YET_SUBMITTED:
                    raise
            except WorkerUnavailable:
                if created_at is None or time.monotonic() - begun > FIND_WORKER:
                    raise
            await asyncio.sleep(1.0)

    def _ring(self, answer: Answer) -> None:
        """Wakes the answer's readers: one call into each of their loops, however many answers have
        news.
        """
        for reader in tuple(answer.readers):
            if not reader.told:
                reader.told = True
                if not self._rung:
                    self.loop.call_soon(self._ring_loops)
                self._rung[reader.loop].append(reader)

    def _ring_loops(self) -> None:
        rung, self._rung = self._rung, defaultdict(list)
        for loop, readers in rung.items():
            with contextlib.suppress(RuntimeError):  # that loop has ended, and its readers with it
                loop.call_soon_threadsafe(_ring_all, readers)

    async def _save_regularly(self) -> None:
        while True:
            await asyncio.sleep(SAVE_INTERVAL)
            changed, self._changed = self._changed, set()
            if changed:
                rows = [
                    (answer.message_id, answer.content, answer.seq, answer.status)
                    for answer in changed
                ]
                await self._save(_save_progress, rows)

    async def _in_database(self, function, *arguments):
        """On a thread of the answers' own: the one that requests share has a queue."""
        return await self.loop.run_in_executor(
            self._database, _with_connection, function, *arguments
        )

    async def _save(self, function, *arguments, attempts: int = 7) -> None:
        """A locked database is asked again."""
        for attempt in range(attempts):
            try:
                return await self._in_database(function, *arguments)
            except DatabaseError:
                logger.warning(
                    "an answer could not be saved (attempt %d)", attempt + 1, exc_info=True
                )
                await asyncio.sleep(0.05 * 2**attempt)
        logger.error("an answer could not be saved: %r", arguments)


_the_home: _Home | None = None
_building = threading.Lock()


def _home() -> _Home:
    global _the_home
    with _building:
        if _the_home is None:
            _the_home = _Home()
        return _the_home


async def _at_home(method, *arguments):
    """Calls a method of the home on its loop, from any loop."""
    home = _home()
    return await asyncio.wrap_future(home.run(method(home, *arguments)))


def _ring_all(readers: list[Reader]) -> None:
    for reader in readers:
        reader.ring()


def _fault(error: BaseException) -> dict[str, Any]:
    return {"message": repr(error), "type": "server_error", "param": None, "code": "internal_error"}


# -- rows


def _request_for(message_id: int) -> tuple[Request, CheckpointRef]:
    """What to ask a worker for: the turns before this answer, questions with the answers that they
    got.
    """
    message = Message.objects.select_related("conversation", "checkpoint", "adapter").get(
        pk=message_id
    )
    checkpoint = message.checkpoint or Checkpoint.default()
    if checkpoint is None:
        raise WorkerUnavailable("there is no checkpoint", "no_worker_for_checkpoint")
    turns: list[dict[str, str]] = []
    for role, content in message.conversation.messages.filter(pk__lt=message_id).values_list(
        "role", "content"
    ):
        if role == Message.Role.USER and turns and turns[-1]["role"] == "user":
            turns.pop()  # it got no answer
        if content:
            turns.append({"role": role, "content": content})
    adapter = message.adapter
    request = Request(
        id=str(message.sequence),
        messages=tuple(turns),
        adapter=AdapterRef(adapter.sha256, str(adapter.path)) if adapter else None,
        sampling=as_sampling(message.sampling),
        user=str(message.conversation.owner_id),
    )
    return request, CheckpointRef(checkpoint.name, checkpoint.fingerprint)


def _with_connection(function, *arguments):
    close_old_connections()
    return function(*arguments)


def _save_progress(rows: list[tuple[int, str, int, str]]) -> None:
    # `seq` only rises: two web processes may follow the same answer.
    with transaction.atomic():
        for message_id, content, seq, status in rows:
            Message.objects.filter(
                pk=message_id, status__in=Message.IN_FLIGHT, seq__lte=seq
            ).update(content=content, seq=seq, status=status)


def _save_end(answer: Answer) -> None:
    Message.objects.filter(pk=answer.message_id, status__in=Message.IN_FLIGHT).update(
        content=answer.content,
        seq=answer.seq,
        status=answer.status,
        finish_reason=answer.finish_reason,
        usage=answer.usage,
        timings=answer.timings,
        error=answer.error,
        finished_at=timezone.now(),
    )
