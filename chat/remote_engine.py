"""Rows answered by the portal's workers and vLLM servers, for a process without an event loop of
its own: what an evaluation needs of an engine. No Django.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import uuid
from collections.abc import Sequence
from dataclasses import replace

from chat.engine.prompt_process import prompt_ids
from chat.engine.prompts import Prompter
from chat.engine.request import CheckpointRef, Event, GenerationRefused, Request, Sink
from chat.prompters import prompter_of
from chat.worker.prompt_renderer import Rendered
from chat.worker.router import Router, WorkerClient, WorkerUnavailable

ATTEMPTS = 4  # for a row: its server may be lost, and another may go on
PAUSE = 2.0  # seconds before a row is asked again where nobody took it
LISTEN = 0.5  # seconds that a step waits for an answer
TIMEOUT = 120.0  # seconds for a question to all servers
# rows given to one server at once: more than it computes together, less than it lets one user wait
IN_FLIGHT_OWN, IN_FLIGHT_VLLM = 64, 512


class RemoteEngine:
    """`submit`, `step`, `abort` and `close` as chat.engine.engine.Engine has them; sinks are called
    in `step`, with all events of an answer at once.

    Each row goes to the server that is least busy, so rows are spread over all of them; one whose
    server is lost is asked again, of the others. Rows are greedy or seeded, so the second answer
    is the first.

    own, vllm: how many of each had the checkpoint at the start.
    """

    def __init__(self, router: Router, checkpoint: CheckpointRef):
        self.own = self.vllm = 0
        self._router, self._checkpoint = router, checkpoint
        # a worker keeps what it answered under an id for a while, and others number rows as well
        self._run_id = uuid.uuid4().hex
        self._answers: queue.SimpleQueue[tuple[Sink, list[Event]] | GenerationRefused]
        self._answers = queue.SimpleQueue()
        self._asked: dict[str, str] = {}  # of rows under way: under which id at the servers
        self._stopped: set[str] = set()
        self._one_by_one = asyncio.Lock()  # or all would choose the same server
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    @classmethod
    def where_held(
        cls, urls: Sequence[str], token: str, checkpoint: CheckpointRef, *, with_adapter: bool
    ) -> RemoteEngine:
        """An engine over those of `urls` that have the checkpoint (with its adapters) just now;
        `own` and `vllm` say how many.
        """
        router = Router(urls, token, renderer=_OwnPrompts(checkpoint.folder))
        engine = cls(router, checkpoint)
        holding = engine._run(router.holding(checkpoint, with_adapter=with_adapter))
        engine.own = sum(isinstance(backend, WorkerClient) for backend in holding)
        engine.vllm = len(holding) - engine.own
        return engine

    @property
    def prompter(self) -> Prompter:
        return prompter_of(self._checkpoint.folder)

    @property
    def in_flight(self) -> int:
        """Rows that all of them together should be given at once."""
        return IN_FLIGHT_OWN * self.own + (IN_FLIGHT_VLLM if self.vllm else 0)

    def submit(self, request: Request, sink: Sink) -> None:
        """Returns at once; a refusal is the row's terminal event."""
        self._asked[request.id] = f"{self._run_id}-{request.id}"
        named = replace(request, id=self._asked[request.id], user=self._run_id)
        asyncio.run_coroutine_threadsafe(self._answer(request.id, named, sink), self._loop)

    def step(self) -> bool:
        """Hands on what has been answered. False: nothing is under way. Raises WorkerUnavailable
        when no server is left, RequestRefused when the adapter does not fit.
        """
        try:
            answer = self._answers.get(block=bool(self._asked), timeout=LISTEN)
        except queue.Empty:
            return bool(self._asked)
        if isinstance(answer, GenerationRefused):
            self._asked.clear()
            raise answer
        sink, events = answer
        self._asked.pop(events[0].id, None)
        for event in events:
            sink(event)
        return True

    def abort(self, id: str) -> None:
        """Its sink gets the terminal event in a later step."""
        if id in self._asked:
            self._stopped.add(id)
            self._run(self._router.abort(self._asked[id]))

    def close(self) -> None:
        self._run(self._router.close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(TIMEOUT)

    async def _answer(self, row: str, request: Request, sink: Sink) -> None:
        """Has a row answered: its events at the end."""
        events: list[Event] = []
        try:
            for attempt in range(ATTEMPTS):
                again = replace(request, id=f"{request.id}-{attempt}")
                await self._submit(row, again)
                self._asked[row] = again.id
                events = await self._read(again.id)
                if events[-1].type == "finished" or row in self._stopped:
                    break
        except GenerationRefused as refusal:
            if isinstance(refusal, WorkerUnavailable) or refusal.code == "invalid_adapter":
                self._answers.put(refusal)
                return
            events = [Event(row, 1, "failed", {"error": refusal.as_error()})]
        self._answers.put((sink, [replace(event, id=row) for event in events]))

    async def _submit(self, row: str, request: Request) -> None:
        """Waits where everybody has all that they take. Raises GenerationRefused."""
        failures = 0
        while True:
            try:
                async with self._one_by_one:
                    return await self._router.submit(request, self._checkpoint)
            except WorkerUnavailable:
                failures += 1
                if failures == ATTEMPTS:
                    raise
            except GenerationRefused as refusal:
                if refusal.code != "queue_full" or row in self._stopped:
                    raise
            await asyncio.sleep(PAUSE)

    async def _read(self, id: str) -> list[Event]:
        """Up to the terminal one."""
        try:
            return [event async for news in self._router.events(id) for event in news]
        except WorkerUnavailable as error:
            return [Event(id, 1, "failed", {"error": error.as_error()})]


class _OwnPrompts:
    """A Renderer in this process."""

    def __init__(self, folder: str):
        self._folder = folder

    async def render(self, folder: str, request: Request) -> Rendered:
        prompter = prompter_of(self._folder)
        ids = prompt_ids(
            prompter, request.messages, request.text, request.begun, request.sampling.thinking
        )
        return Rendered(ids, sorted(prompter.end_ids), request.sampling.json_schema)
