"""A log that readers follow, and the doorbell with which another thread tells of news."""

import asyncio
import threading

from chat.engine.request import Event
from chat.worker.event_log import Doorbell, FollowedLog


def delta(log, text):
    log.append(Event(log.id, log.last + 1, "delta", {"text": text, "tokens": 1}))
    log.notify()


def end(log):
    log.append(Event(log.id, log.last + 1, "finished", {}))
    log.notify()


async def read(log, after=0):
    return [event async for news in log.follow(after) for event in news]


async def test_readers_come_early_late_and_again():
    log = FollowedLog("one")
    early = asyncio.create_task(read(log))
    await asyncio.sleep(0)
    delta(log, "a")
    await asyncio.sleep(0)
    delta(log, "b")
    late = asyncio.create_task(read(log))
    again = asyncio.create_task(read(log, after=1))
    await asyncio.sleep(0)
    assert len(log.followers) == 3
    delta(log, "c")
    end(log)
    async with asyncio.timeout(10):
        for task, text in ((early, "abc"), (late, "abc"), (again, "bc")):
            events = await task
            assert "".join(event.data.get("text", "") for event in events) == text
            assert events[-1].type == "finished" and events[-1].seq == 4
        assert await read(log, after=4) == []
        assert [event.seq for event in await read(log)] == [3, 4]  # deltas joined
    assert not log.followers


async def test_a_reader_that_leaves_is_forgotten():
    log = FollowedLog("one")
    reading = asyncio.create_task(read(log))
    await asyncio.sleep(0)
    assert log.followers
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert not log.followers


async def test_the_doorbell_wakes_the_loop_once_for_all_that_came_meanwhile():
    answered, woken, done = [], [], asyncio.Event()

    def answer(log):
        answered.append(log.id)
        if log.id == "last":
            done.set()

    doorbell = Doorbell(answer)
    look = doorbell.look
    doorbell.look = lambda: (woken.append(len(answered)), look())

    def work():
        for name in ("first", "second", "last"):
            doorbell.ring(FollowedLog(name))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()  # the loop had no chance to look
    async with asyncio.timeout(10):
        await done.wait()
    assert answered == ["first", "second", "last"] and woken == [0]
