"""A batch, carried out: every line asked as its door would, at most as many at once as leave room
for people who wait, and written as soon as it is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from channels.db import database_sync_to_async
from django.core.exceptions import ValidationError
from django.utils import timezone

from chat import registry
from chat.batches import files, lines
from chat.batches.rows import BatchRun
from chat.conversations.turns import model_label
from chat.engine.request import CheckpointRef, GenerationRefused, Request
from chat.worker import router
from portal.budget import tokens
from portal.models import Run, TokenUsage
from portal.runs.heartbeat import CANCEL, Heartbeat, RunFailed, StopRequested
from portal.runs.work import RunWork

WINDOW = timedelta(hours=24)
EXPIRED = "batch_expired"
LOOK = 0.5  # seconds between two looks for room
PAUSE = 5.0  # seconds before a line is asked again that nobody took
ATTEMPTS = 3  # of a line whose answer was lost on its way
SHARE = 0.75  # of a worker's rows, at most: the rest is free when somebody comes
ELSEWHERE = 4  # at once on a server that does not tell how busy it is


@dataclass(frozen=True)
class Endpoint:
    """A door as lines name it: its body read, asked, and its answers as a body."""

    read: Callable
    asked: Callable
    answered: Callable


def endpoints() -> dict[str, Endpoint]:
    from chat.api import openai, openai_completions, openai_request

    return {
        "/v1/chat/completions": Endpoint(
            openai_request.chat_request, openai.asked, openai.answered
        ),
        "/v1/completions": Endpoint(
            openai_completions.wanted_of, openai_completions.asked, openai_completions.answered
        ),
    }


def room(states: list[dict[str, Any]], mine: int) -> int:
    """How many more answers may be begun, of what the workers tell; mine: those under way."""
    most = busy = 0
    for state in states:
        if state["state"] != "ready":
            continue
        if "max_rows" not in state:
            most += ELSEWHERE
        elif not state["queue"]:  # nobody waits
            most += max(1, int(state["max_rows"] * SHARE))
            busy += state["active_rows"]
    return most - max(busy, mine)


class BatchWork(RunWork):
    kind = Run.Kind.BATCH  # type: ignore[assignment]  # a member, which mypy takes for its value
    model = BatchRun
    queue = "batch"

    def load(self, run_id: int) -> BatchRun:
        return BatchRun.objects.select_related("owner", "source").get(pk=run_id)

    def work(self, heartbeat: Heartbeat) -> None:
        heartbeat.work_asks = True  # a line must not be cut
        self._rows = BatchRun.objects.filter(pk=self.run.pk)
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with _alone(self.run.folder / "lock"):
            self._validate(heartbeat)
            self._output = lines.Written(output_path(self.run))
            self._errors = lines.Written(errors_path(self.run))
            done = len(self._output) + len(self._errors)
            self.log(f"run {self.run.pk}, attempt {self.run.attempt}: {done:,} lines are done")
            try:
                reason = asyncio.run(self._answer_all(heartbeat))
                if reason == EXPIRED:
                    self._expire()
                self._tell(heartbeat)
            finally:
                self._output.close()
                self._errors.close()
            if reason in (None, CANCEL, EXPIRED):
                heartbeat.tell(phase=Run.Phase.SAVING)
                publish(self.run)
        if reason == EXPIRED:
            raise RunFailed(EXPIRED, "not all lines were answered within 24 hours")
        if reason is not None:
            raise StopRequested(reason)

    def _validate(self, heartbeat: Heartbeat) -> None:
        if self.run.validated_at is not None:
            return
        heartbeat.tell(phase=Run.Phase.CHECKING)
        problems, count = lines.problems_of(self.run.source.path, self.run.recipe["endpoint"])
        if problems:
            heartbeat.tell(lambda: self._rows.update(problems=problems))
            raise RunFailed(
                "batch_invalid", f"line {problems[0]['line']}: {problems[0]['message']}"
            )
        now = timezone.now()
        heartbeat.tell(lambda: self._rows.update(validated_at=now), total=count)

    def _left(self) -> Iterator[tuple[str, dict]]:
        """(custom_id, body) of the lines that are not done."""
        done = self._output.ids | self._errors.ids
        for _number, text in lines.numbered(self.run.source.path):
            line = json.loads(text.decode("utf-8-sig"))
            if line["custom_id"] not in done:
                yield line["custom_id"], line["body"]

    async def _answer_all(self, heartbeat: Heartbeat) -> str | None:
        """None when every line is done, or why it stopped: EXPIRED, or a heartbeat's reason."""
        self._endpoint = endpoints()[self.run.recipe["endpoint"]]
        self._router = router.get_router()
        ends = self.run.created_at + WINDOW
        under_way: set[asyncio.Task] = set()

        async def stopped() -> str | None:
            """After a while, or an answer."""
            nonlocal under_way
            if under_way:
                done, under_way = await asyncio.wait(
                    under_way, timeout=LOOK, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()  # a fault of ours ends the run
            else:
                await asyncio.sleep(LOOK)
            self._tell(heartbeat, phase=Run.Phase.PREDICTING)
            return heartbeat.stop_requested or (EXPIRED if timezone.now() > ends else None)

        reason = heartbeat.stop_requested or (EXPIRED if timezone.now() > ends else None)
        try:
            for custom_id, body in self._left():
                while reason is None and room(await self._router.status(), len(under_way)) <= 0:
                    reason = await stopped()
                if reason is not None:
                    return reason
                under_way.add(asyncio.create_task(self._line(custom_id, body)))
            while under_way and reason is None:
                reason = await stopped()
            return reason
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            await self._router.close()

    async def _line(self, custom_id: str, body: dict) -> None:
        from chat.api import errors

        status, answer, model, spent = 0, None, "", (0, 0)
        for attempt in range(10**9):
            try:
                status, answer, model, spent = await self._asked(body)
                break
            except errors.REFUSALS as error:
                later = isinstance(error, GenerationRefused) and error.later
                lost = isinstance(error, errors.GenerationFailed) and attempt + 1 < ATTEMPTS
                if not later and not lost:
                    response = errors.response_of(error)
                    status, answer = response.status_code, json.loads(response.content)
                    break
            await asyncio.sleep(PAUSE)
        written = self._output if status == 200 else self._errors
        text = json.dumps(lines.result(custom_id, status, answer), ensure_ascii=False)
        written.add(custom_id, text)
        if any(spent):
            count = database_sync_to_async(tokens.count)
            await count(self.run.owner_id, str(TokenUsage.Door.BATCH), model, *spent)

    async def _asked(self, body: dict) -> tuple[int, dict, str, tuple[int, int]]:
        """(HTTP status, body, who answered, tokens of prompt and answer) as the door would have
        answered.
        """
        from chat.api import errors

        wanted = self._endpoint.read({**body, "stream": False, "stream_options": None})
        try:
            find = database_sync_to_async(registry.find_model)
            checkpoint, adapter = await find(self.run.owner, wanted.model)
        except LookupError:
            response = errors.no_such_model(wanted.model)
            return response.status_code, json.loads(response.content), "", (0, 0)
        await database_sync_to_async(tokens.check)(self.run.owner_id)
        requests = self._endpoint.asked(self.run.owner, checkpoint, adapter, wanted)
        answers = await self._collect(requests, checkpoint.ref())
        told = self._endpoint.answered(wanted, answers)
        spent = told["usage"]["prompt_tokens"], told["usage"]["completion_tokens"]
        return 200, told, model_label(checkpoint, adapter), spent

    async def _collect(self, requests: list[Request], checkpoint: CheckpointRef) -> list:
        from chat.api.completion import CollectedCompletion, take

        answers = [CollectedCompletion() for _request in requests]

        async def read(request: Request, answer: CollectedCompletion) -> None:
            async for handful in self._router.events(request.id):
                for event in handful:
                    take(answer, event)

        begun: list[Request] = []
        try:
            for request in requests:
                await self._router.submit(request, checkpoint)
                begun.append(request)
            await asyncio.gather(*map(read, requests, answers))
        except BaseException:
            stops = (self._router.abort(request.id) for request in begun)
            await asyncio.shield(asyncio.gather(*stops, return_exceptions=True))
            raise
        return answers

    def _expire(self) -> None:
        for custom_id, _body in list(self._left()):
            message = "The line was not answered within 24 hours."
            told = lines.unanswered(custom_id, EXPIRED, message)
            self._errors.add(custom_id, json.dumps(told))

    def _tell(self, heartbeat: Heartbeat, **more: Any) -> None:
        failed = len(self._errors)
        rows = self._rows
        heartbeat.tell(
            *([] if failed == self.run.failed else [lambda: rows.update(failed=failed)]),
            progress=len(self._output) + failed,
            **more,
        )
        self.run.failed = failed


def output_path(run: BatchRun) -> Path:
    return run.folder / "output.jsonl"


def errors_path(run: BatchRun) -> Path:
    return run.folder / "errors.jsonl"


def publish(run: BatchRun) -> None:
    """Makes files of what has been written. Harmless to repeat."""
    BatchRun.objects.filter(pk=run.pk).update(
        output=files.made(run, output_path(run), "output"),
        errors=files.made(run, errors_path(run), "errors"),
    )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits for a process that has been fenced off and has not noticed yet."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def begin(user, source, endpoint: str, metadata: dict) -> BatchRun:
    """Queues a batch. ValidationError (TooManyQueued)."""
    from portal.runs import lifecycle

    if endpoint not in endpoints():
        raise ValidationError({"endpoint": ValidationError(", ".join(endpoints()), "invalid")})
    recipe = {"endpoint": endpoint, "metadata": metadata}
    run = BatchRun(owner=user, kind=Run.Kind.BATCH, source=source, recipe=recipe)
    run.name = source.name[:120]
    lifecycle.enqueue(run)
    return run
