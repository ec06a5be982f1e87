"""Random submit, abort, detach, attach and kill: nothing leaks, nobody gets another's words, every
reading ends.
"""

import asyncio
import contextlib
import random

import pytest

from chat.engine.request import Request, RequestRefused
from chat.worker.router import SequenceLost, WorkerClient, WorkerUnavailable
from tests.support.pretend_engine import text
from tests.support.worker_process import TOKEN, PretendWorker

KINDS = [
    "words 3",
    "words 40",
    "every 0.002 words 40",
    "every 0.01 words 500",
    "hang",
    "refuse queue_full",
    "",
]


class Soak:
    """A few clients of one worker. Each answer is checked against what its sequence must have
    written so far.
    """

    def __init__(self, worker: PretendWorker, seed: int):
        self.worker, self.random = worker, random.Random(seed)
        self.clients = [WorkerClient(worker.url, TOKEN) for _ in range(3)]
        self.known: dict[str, str] = {}  # id -> what was read of it
        self.readers: set[asyncio.Task] = set()
        self.lost = self.ended = 0

    async def run(self, operations: int, kill_share: float) -> None:
        for number in range(operations):
            kind = self.random.choices(
                ["submit", "abort", "attach", "detach", "cut", "kill"],
                [40, 15, 20, 15, 5, kill_share],
            )[0]
            await getattr(self, kind)(number)
            await asyncio.sleep(self.random.choice([0, 0, 0.005]))

    async def submit(self, number):
        request = Request(
            f"soak-{number}", ({"role": "user", "content": self.random.choice(KINDS)},)
        )
        client = self.random.choice(self.clients)
        try:
            await client.submit(request)
        except (RequestRefused, WorkerUnavailable):
            return
        self.known[request.id] = ""
        self.read(client, request.id)

    async def abort(self, _number):
        if self.known:
            with contextlib.suppress(WorkerUnavailable):
                await self.random.choice(self.clients).abort(self.random.choice(list(self.known)))

    async def attach(self, _number):
        if self.known:
            self.read(self.random.choice(self.clients), self.random.choice(list(self.known)))

    async def detach(self, _number):
        if self.readers:
            self.random.choice(list(self.readers)).cancel()

    async def cut(self, _number):
        socket = self.random.choice(self.clients)._socket
        connection = socket and socket._response.connection
        if connection is not None and connection.transport is not None:
            connection.transport.abort()

    async def kill(self, _number):
        await asyncio.to_thread(self.worker.kill)
        await asyncio.to_thread(self.worker.start)

    def read(self, client, id):
        async def reading():
            pieces = []
            try:
                async for events in client.events(id):
                    for event in events:
                        if event.type == "delta":
                            pieces.append(event.data["text"])
                            assert text(id, 500).startswith("".join(pieces)), id
                    if events[-1].terminal:
                        self.ended += 1
            except WorkerUnavailable:
                self.lost += 1

        task = asyncio.create_task(reading())
        self.readers.add(task)
        task.add_done_callback(self.readers.discard)

    async def settle(self) -> dict:
        """Aborts what is left; every reading must end; returns the worker's status once it is at
        rest.
        """
        client = WorkerClient(self.worker.url, TOKEN)
        for id in self.known:
            await client.abort(id)
        async with asyncio.timeout(20):
            while self.readers:
                await asyncio.gather(*self.readers, return_exceptions=True)
        for each in self.clients:
            await each.close()
        async with asyncio.timeout(10):
            while True:
                status = await client.status()
                if (
                    status["sequences"] == status["active_rows"] == status["queue"] == 0
                    and status["clients"] == 1
                ):
                    break
                await asyncio.sleep(0.1)
        await client.close()
        return status


async def soak(operations: int, kill_share: float, seed: int) -> Soak:
    with PretendWorker(grace=1.0, rows=6) as worker:
        loop = asyncio.get_running_loop()
        faults = []
        loop.set_exception_handler(lambda _loop, context: faults.append(context))
        state = Soak(worker, seed)
        while True:
            try:
                if (await state.clients[0].status())["state"] == "ready":
                    break
            except WorkerUnavailable:
                pass
            await asyncio.sleep(0.05)
        await state.run(operations, kill_share)
        status = await state.settle()
        assert status["threads"] <= 4, status  # main, engine, submit, and one of asyncio's
        assert not faults, faults
        assert {task for task in asyncio.all_tasks() if task is not asyncio.current_task()} == set()
        return state


async def test_a_short_random_schedule():
    state = await soak(150, kill_share=0, seed=1)
    assert state.ended > 20
    assert state.lost < state.ended


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
async def test_a_thousand_random_operations_with_kills(seed):
    state = await soak(1000, kill_share=1, seed=seed)
    assert state.ended > 50  # how many finish between the kills depends on the machine


async def test_a_reader_of_a_sequence_that_nobody_has_gets_an_end():
    with PretendWorker() as worker:
        client = WorkerClient(worker.url, TOKEN)
        with pytest.raises(SequenceLost):
            async for _events in client.events("never submitted"):
                pass
        await client.close()
