"""The event loop, on a thread of its own, on which answers in flight live."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from django.db import DatabaseError, close_old_connections, connections
from django.utils import timezone

from chat.conversations.frames import LiveAnswer, Reader
from chat.conversations.messages import (
    earlier_turns,
    request_for,
    save_end,
    save_left_out,
    save_progress,
)
from chat.engine.request import GenerationRefused, RequestRefused, error_object
from chat.models import Message
from chat.worker.router import Router, SequenceLost, WorkerUnavailable, get_router

logger = logging.getLogger(__name__)

SAVE_INTERVAL = 1.0  # seconds
SAVE_ATTEMPTS = 7  # within 3 seconds, not counting what each waits for a lock
SAVE_LATE = 5.0  # seconds between two attempts after those
KEEP_ENDED = 10.0  # seconds that an ended answer stays in memory for readers on their way
NOT_YET_SUBMITTED = timedelta(seconds=15)  # age at which a row that no worker knows counts as lost
FIND_WORKER = 60.0  # seconds to wait for a worker that may still know a row's sequence
STOP_WAIT = 3.0  # seconds that `stop` waits for the end


class GenerationLoop:
    """The event loop on its thread, what is in flight there, and the thread that reads and writes
    its rows.
    """

    def __init__(self):
        self.answers: dict[int, LiveAnswer] = {}
        self._changed: set[LiveAnswer] = set()
        self._rung: dict[asyncio.AbstractEventLoop, list[Reader]] = defaultdict(list)
        self._tasks: set[asyncio.Task] = set()
        self._unsaved: set[LiveAnswer] = set()  # ended, while the database was away
        self._done: dict[LiveAnswer, asyncio.Event] = {}
        self._database = ThreadPoolExecutor(1, thread_name_prefix="answers-database")
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="answers", daemon=True).start()
        atexit.register(self.close)

    def close(self) -> None:
        """At the end of the process. The worker goes on for its grace period; the next process
        takes the answers up again.
        """

        async def disconnect():
            for task in tuple(self._tasks):
                task.cancel()  # first, or they would take the closed connection for a lost answer
            await get_router().close()

        with contextlib.suppress(Exception):
            self.run(disconnect()).result(1.0)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self._spawn(self._save_regularly())
        self.loop.run_forever()

    def run(self, work: Coroutine):
        """From any thread; a concurrent.futures.Future."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def _spawn(self, work: Coroutine) -> None:
        # An empty context: the caller's request, its database thread and its language end long
        # before the answer.
        task = self.loop.create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- everything below runs on the loop

    async def begin(self, message: Message) -> None:
        """Returns when a worker has taken it; a refusal is saved as the answer's end and raised."""
        answer = self._enter(LiveAnswer.of_row(message))
        router = get_router()
        try:
            answer.left_out = await self._submit(message, router)
        except BaseException as error:
            told = error.as_error() if isinstance(error, GenerationRefused) else _fault(error)
            answer.fail(told)
            await self._end(answer)
            raise
        self._spawn(self._write_down(answer, router))

    async def _submit(self, message: Message, router: Router) -> int:
        """Has a worker take the answer; of a conversation that outgrew the context without its
        oldest turns. Returns how many those are.
        """
        left_out = 0
        while True:
            request, checkpoint = await self._in_database(request_for, message.pk, left_out)
            try:
                await router.submit(request, checkpoint)
            except RequestRefused as refusal:
                earlier = earlier_turns(request)
                if refusal.code != "context_length_exceeded" or not earlier:
                    raise
                # whole rounds, twice as many each time; only the worker can count tokens
                left_out += min(max(2, left_out), earlier)
                continue
            if left_out:
                await self._in_database(save_left_out, message.pk, left_out)
            return left_out

    async def resume(self, row: Message) -> LiveAnswer:
        answer = self.answers.get(row.pk)
        if answer is None:
            answer = self._enter(LiveAnswer.of_row(row))
            self._spawn(self._write_down(answer, get_router(), created_at=row.created_at))
        return answer

    async def stop(self, answer: LiveAnswer) -> None:
        try:
            await get_router().abort(answer.sequence)
        except WorkerUnavailable as error:
            logger.info("message %s: nobody there to stop it (%s)", answer.message_id, error)
        done = self._done.get(answer)
        if done is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), STOP_WAIT)

    def _enter(self, answer: LiveAnswer) -> LiveAnswer:
        self.answers[answer.message_id] = answer
        self._done[answer] = asyncio.Event()
        return answer

    def _leave(self, answer: LiveAnswer) -> None:
        """The end: readers are told."""
        answer.ended = True
        self._changed.discard(answer)
        self._ring(answer)
        self._done.pop(answer).set()

    async def _write_down(self, answer: LiveAnswer, router: Router, created_at=None) -> None:
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
        await self._end(answer)

    async def _end(self, answer: LiveAnswer) -> None:
        """The row first, then the readers: what they see last is true already. A database that
        stays away does not keep them waiting.
        """
        await self.loop.run_in_executor(self._database, answer.render)
        saved = await self._save(save_end, answer)
        self._leave(answer)
        if saved:
            self._forget_soon(answer)
        else:
            self._spawn(self._save_at_last(answer))
        if not self._done:
            await self._save(connections.close_all)

    async def _save_at_last(self, answer: LiveAnswer) -> None:
        """Until the database takes it, or the process ends; latecomers find the answer here."""
        self._unsaved.add(answer)
        saved = False
        while not saved:
            await asyncio.sleep(SAVE_LATE)
            saved = await self._save(save_end, answer, attempts=1)
        self._unsaved.remove(answer)
        logger.info("message %s: saved at last", answer.message_id)
        self._forget_soon(answer)

    def _forget_soon(self, answer: LiveAnswer) -> None:
        """Latecomers find the answer here for a moment, then in its row."""
        self.loop.call_later(KEEP_ENDED, self.answers.pop, answer.message_id, None)

    async def _read(self, answer: LiveAnswer, router: Router, created_at) -> None:
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

    async def quiesce(self) -> None:
        """Returns when no answer is in flight and its rows are written."""
        while self._done:
            await asyncio.gather(*(ended.wait() for ended in tuple(self._done.values())))
        while self._unsaved:
            await asyncio.sleep(SAVE_LATE)
        await self._save(connections.close_all)

    def _ring(self, answer: LiveAnswer) -> None:
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
                    (answer.message_id, answer.content, answer.offset, answer.status)
                    for answer in changed
                ]
                await self._save(save_progress, rows)

    async def _in_database(self, function, *arguments):
        """On a thread of the answers' own: the one that requests share has a queue."""
        return await self.loop.run_in_executor(
            self._database, _with_connection, function, *arguments
        )

    async def _save(self, function, *arguments, attempts: int = SAVE_ATTEMPTS) -> bool:
        """A locked database is asked again; False when that did not help."""
        for attempt in range(attempts):
            try:
                await self._in_database(function, *arguments)
                return True
            except DatabaseError as error:
                logger.warning("the database does not take an answer (%s)", error)
                if attempt + 1 < attempts:
                    await asyncio.sleep(0.05 * 2**attempt)
        return False


_current: GenerationLoop | None = None
_building = threading.Lock()


def current() -> GenerationLoop:
    """The process's loop, started with the first answer."""
    global _current
    with _building:
        if _current is None:
            _current = GenerationLoop()
        return _current


def forget() -> None:
    """Ends the process's loop, as the end of the process does; the next answer starts another."""
    global _current
    if _current is not None:
        _current.close()
        _current = None


async def on_loop(method, *arguments):
    """Calls a method of the process's GenerationLoop on that loop, from any other."""
    loop = current()
    return await asyncio.wrap_future(loop.run(method(loop, *arguments)))


def _ring_all(readers: list[Reader]) -> None:
    for reader in readers:
        reader.ring()


def _with_connection(function, *arguments):
    close_old_connections()
    return function(*arguments)


def _fault(error: BaseException) -> dict[str, Any]:
    return error_object(repr(error), "internal_error")
