"""Rows answered by vLLM servers, for a process without an event loop of its own: what an evaluation
needs of an engine. No Django.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Sequence
from dataclasses import replace

from chat.engine.prompt_process import load_prompter, prompt_ids
from chat.engine.prompts import Prompter
from chat.engine.request import CheckpointRef, Event, GenerationRefused, Request, Sink
from chat.worker.addresses import WorkerAddress
from chat.worker.prompt_renderer import Rendered
from chat.worker.router import Router, WorkerUnavailable

ATTEMPTS = 4  # for a row: its server may be lost, and another may go on
PAUSE = 2.0  # seconds before a row is asked again where nobody took it
LISTEN = 0.5  # seconds that a step waits for an answer
SUBMIT_TIMEOUT = 120.0


class RemoteEngine:
    """`submit`, `step`, `abort` and `close` as chat.engine.engine.Engine has them; sinks are called
    in `step`, with all events of an answer at once.

    Each row goes to the server that is least busy, so rows are spread over all of them; one whose
    server is lost is asked again. Rows are greedy or seeded, so the second answer is the first.
    """

    def __init__(self, router: Router, checkpoint: CheckpointRef, prompter: Prompter):
        self.prompter = prompter
        self._router, self._checkpoint = router, checkpoint
        self._answers: queue.SimpleQueue[tuple[Sink, list[Event]]] = queue.SimpleQueue()
        self._asked: dict[str, str] = {}  # of rows under way: under which id, after a second try
        self._stopped: set[str] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    @classmethod
    def where_served(
        cls, urls: Sequence[str], token: str, checkpoint: CheckpointRef, *, with_adapter: bool
    ) -> RemoteEngine | None:
        """An engine over those of the workers' `urls` that are vLLM's; None when no such server has
        the checkpoint (with its adapters).
        """
        urls = [url for url in urls if WorkerAddress.parse(url).vllm]
        if not urls:
            return None
        prompter = load_prompter(checkpoint.folder)
        router = Router(urls, token, renderer=_OwnPrompts(prompter))
        engine = cls(router, checkpoint, prompter)
        if engine._run(router.is_served(checkpoint, with_adapter=with_adapter)):
            return engine
        engine.close()
        return None

    def submit(self, request: Request, sink: Sink) -> None:
        """Raises RequestRefused; WorkerUnavailable when no server is left."""
        self._run(self._submit(request))
        self._asked[request.id] = request.id
        asyncio.run_coroutine_threadsafe(self._answer(request, sink), self._loop)

    def step(self) -> bool:
        """Hands on what has been answered. False: nothing is under way."""
        try:
            sink, events = self._answers.get(block=bool(self._asked), timeout=LISTEN)
        except queue.Empty:
            return bool(self._asked)
        del self._asked[events[0].id]
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
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(SUBMIT_TIMEOUT)

    async def _submit(self, request: Request) -> None:
        for attempt in range(ATTEMPTS):
            try:
                return await self._router.submit(request, self._checkpoint)
            except WorkerUnavailable:
                if attempt + 1 == ATTEMPTS:
                    raise
            await asyncio.sleep(PAUSE)

    async def _answer(self, request: Request, sink: Sink) -> None:
        """The events of a submitted request, at the end."""
        events = await self._read(request.id)
        for attempt in range(1, ATTEMPTS):
            if events[-1].type == "finished" or request.id in self._stopped:
                break
            again = replace(request, id=f"{request.id}-{attempt}")
            self._asked[request.id] = again.id
            try:
                await self._submit(again)
                events = await self._read(again.id)
            except GenerationRefused as error:  # nobody left to ask
                events = [Event(again.id, 1, "failed", {"error": error.as_error()})]
        self._answers.put((sink, [replace(event, id=request.id) for event in events]))

    async def _read(self, id: str) -> list[Event]:
        """Up to the terminal one."""
        try:
            return [event async for news in self._router.events(id) for event in news]
        except WorkerUnavailable as error:
            return [Event(id, 1, "failed", {"error": error.as_error()})]


class _OwnPrompts:
    """A Renderer in this process."""

    def __init__(self, prompter: Prompter):
        self._prompter = prompter

    async def render(self, folder: str, request: Request) -> Rendered:
        ids = prompt_ids(
            self._prompter, request.messages, request.text, request.begun, request.sampling.thinking
        )
        return Rendered(ids, sorted(self._prompter.end_ids), request.sampling.json_schema)
