"""Chat leaves memory for a run and comes back by itself (chat/worker/serving.py)."""

import asyncio
import contextlib

import pytest

from chat.worker import serving
from chat.worker.serving import PAUSED, OneCheckpoint, Serving, Target
from tests.support.pretend_engine import PretendEngine


class Memory(OneCheckpoint):
    """room: there is some for chat. asked: a run wants it."""

    def __init__(self):
        super().__init__(Target("tiny", "f", key=("tiny",)), PretendEngine)
        self.room, self.asked = True, False
        self.kept: list[list[str]] = []

    def reserve(self, target):
        return self.room

    def must_leave(self):
        return self.asked

    def keep(self, targets):
        self.kept.append([target.name for target in targets])
        if not targets:
            self.asked, self.room = False, False  # the run has it now


class House:
    def __init__(self):
        self.busy, self.blamed, self.given_up = False, [], []

    def tell_change(self): ...

    def is_busy(self, running):
        return self.busy

    def blame(self, running, cause):
        self.blamed.append(cause)

    def refuse_waiting(self, target, error): ...

    def give_up(self, reason):
        self.given_up.append(reason)


async def until(true, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


@pytest.fixture
async def chat(monkeypatch):
    monkeypatch.setattr(serving, "LOOK_EVERY", 0.01)
    memory, house = Memory(), House()
    found = Serving(memory, house)
    following = asyncio.create_task(found.follow())
    yield found, memory, house
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
    await found.close()


async def test_it_leaves_for_a_run_and_comes_back(chat):
    found, memory, house = chat
    await until(lambda: found.takes("f"))
    house.busy = True
    memory.asked = True
    await until(lambda: not found.takes("f"))
    await asyncio.sleep(0.05)
    assert found.current is not None and not memory.kept  # an answer is still being written
    house.busy = False
    await until(lambda: found.current is None and memory.kept == [[]])
    assert found.coming.phase == PAUSED and found.is_due("f")  # messages wait for it
    await asyncio.sleep(0.05)
    assert found.current is None and not house.given_up
    memory.room = True
    await until(lambda: found.takes("f"))
    assert found.coming is None


async def test_a_start_beside_a_run_waits(monkeypatch):
    monkeypatch.setattr(serving, "LOOK_EVERY", 0.01)
    memory = Memory()
    memory.room = False
    found = Serving(memory, House())
    following = asyncio.create_task(found.follow())
    await until(lambda: found.coming is not None)
    assert found.coming.told()["phase"] == PAUSED and found.current is None
    memory.room = True
    await until(lambda: found.takes("f"))
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await found.close()
