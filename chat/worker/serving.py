"""Which checkpoint a worker serves, and how that changes without its other answers noticing.

Another checkpoint is loaded beside the one that is served where both fit into memory; else the
running answers end first. It is tried out with a sentence before anybody gets it. When anything of
this fails the worker goes back to what it served before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from chat.engine.request import Request, Sink

log = logging.getLogger(__name__)

PAUSED = "paused"  # phase of a checkpoint that comes back when a run has ended
LOOK_EVERY = 3.0  # seconds between two looks at what is to be served
DRAIN = 60.0  # seconds that running answers get where the memory is needed for another checkpoint
RETIRE = 600.0  # seconds that they get where it is not


class EngineLike(Protocol):
    """What the worker needs of chat.engine.engine.Engine."""

    def submit(self, request: Request, sink: Sink) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def status(self) -> dict[str, Any]: ...
    def run_forever(self, stop_event: threading.Event) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Target:
    """What is to be served. key: equal when nothing has to be loaded anew. usual_seconds: how long
    its last load took, if that is known.
    """

    name: str
    fingerprint: str
    key: tuple[Any, ...] = ()
    usual_seconds: float | None = None


class Supply(Protocol):
    """Where checkpoints come from, and who is told of them. Everything may block: it is called on
    threads.
    """

    def first(self) -> Target:
        """What to serve after the start."""

    def wanted(self) -> Target | None:
        """What to serve now; None: nothing any more, the worker should end."""

    def reserve(self, target: Target) -> bool:
        """Takes the memory that it needs, when all else of this worker leaves; False: a run has
        it now, ask again.
        """

    def must_leave(self) -> bool:
        """Does a run wait for the memory of what is served?"""

    def keep(self, targets: list[Target]) -> None:
        """These are in memory, or about to be, and nothing else is any more."""

    def fits_beside(self, target: Target) -> bool:
        """Is there memory for it beside what is in memory?"""

    def load(self, target: Target) -> EngineLike: ...

    def try_out(self, engine: EngineLike) -> str:
        """A sentence that it really generates; raises when it cannot."""

    def tell(self, target: Target, phase: str) -> None:
        """phase: draining | loading | checking."""

    def succeeded(self, target: Target, sentence: str, seconds: float) -> None: ...

    def failed(self, target: Target, error: Exception) -> Target | None:
        """What to serve instead, if anything."""

    def release(self) -> None:
        """Gives what is no longer used back to the system."""


class OneCheckpoint:
    """A Supply that always has the same, for processes without a portal behind them."""

    def __init__(self, target: Target, load: Callable[[], EngineLike]):
        self._target, self._load = target, load

    def first(self) -> Target:
        return self._target

    def wanted(self) -> Target | None:
        return self._target

    def reserve(self, target: Target) -> bool:
        return True

    def must_leave(self) -> bool:
        return False

    def keep(self, targets: list[Target]) -> None: ...

    def fits_beside(self, target: Target) -> bool:
        return True

    def load(self, target: Target) -> EngineLike:
        return self._load()

    def try_out(self, engine: EngineLike) -> str:
        return ""

    def tell(self, target: Target, phase: str) -> None: ...

    def succeeded(self, target: Target, sentence: str, seconds: float) -> None: ...

    def failed(self, target: Target, error: Exception) -> Target | None:
        return None

    def release(self) -> None: ...


@dataclass
class Coming:
    """A checkpoint on its way. since: time.monotonic()."""

    target: Target
    phase: str = "loading"
    since: float = field(default_factory=time.monotonic)

    def told(self) -> dict[str, Any]:
        """As the status and events of waiting sequences tell it."""
        usual = self.target.usual_seconds
        return {
            "checkpoint": self.target.name,
            "phase": self.phase,
            "seconds": int(time.monotonic() - self.since),
            "usual_seconds": None if usual is None else round(usual, 1),
        }


class Running:
    """An engine on its thread. accepting: it takes new sequences."""

    def __init__(self, target: Target, engine: EngineLike, died: Callable[[str], None]):
        self.target, self.engine, self.accepting = target, engine, True
        self._died, self._loop = died, asyncio.get_running_loop()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.engine.run_forever(self._stop)
        except BaseException:
            log.exception("the engine's thread has died; ending the worker")
            self._loop.call_soon_threadsafe(self._died, "the engine's thread has died")

    async def close(self) -> None:
        """Ends what runs."""
        self.accepting = False
        self._stop.set()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self.engine.close)


class House(Protocol):
    """What Serving needs of the worker's server; on the event loop."""

    def tell_change(self) -> None:
        """What is served, or comes, is another."""

    def is_busy(self, running: Running) -> bool:
        """Has it sequences that have not ended?"""

    def blame(self, running: Running, cause: str) -> None:
        """Its sequences are about to be ended, and that is why."""

    def refuse_waiting(self, target: Target, error: Exception) -> None:
        """It will not be served: nobody need wait for it."""

    def give_up(self, reason: str) -> None:
        """Nothing can be served: the process should end."""


class Serving:
    """current: what takes sequences; coming: what is being loaded; resting: what was taken out of
    memory because nobody asked, and is loaded when somebody does.
    """

    def __init__(self, supply: Supply, house: House):
        self.supply, self.house = supply, house
        self.current: Running | None = None
        self.coming: Coming | None = None
        self.resting: Target | None = None
        self.expected: Target | None = None  # found by `look`, not begun yet
        self._retiring: dict[Running, asyncio.Task[None]] = {}
        self._rung = asyncio.Event()
        self._refused: tuple[Any, ...] | None = None  # key of what failed and is wanted still

    async def follow(self) -> bool:
        """Serves what is wanted until nothing is (True) or nothing can be (False)."""
        try:
            target = await asyncio.to_thread(self.supply.first)
        except Exception as error:
            log.exception("cannot tell what to serve")
            self.house.give_up(str(error))
            return False
        served = await self._begin(target)
        while served:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY):
                    await self._rung.wait()
            woken = self._rung.is_set()
            self._rung.clear()
            try:
                wanted = await asyncio.to_thread(self.supply.wanted)
                leave = await asyncio.to_thread(self.supply.must_leave)
            except Exception:
                log.exception("cannot tell whether the served checkpoint is still the right one")
                continue
            if wanted is None:
                return True
            if leave and self.current is not None:
                await self._leave(self.current)
            if wanted.key == self._refused:
                continue
            here = self.resting or (self.current.target if self.current else None)
            if here is None or here.key != wanted.key or (self.resting is not None and woken):
                served = await self._begin(wanted)
            elif self.coming is not None:  # what waited for memory is not wanted any more
                self.coming = None
                self.house.tell_change()
            if self.expected is not None:
                self.expected = None
                self.house.tell_change()
        return False

    async def look(self, fingerprint: str) -> bool:
        """Will the checkpoint be served soon? Looks whether it has just been chosen."""
        if self.is_due(fingerprint):
            if self.resting is not None:
                self._rung.set()
            return True
        try:
            wanted = await asyncio.to_thread(self.supply.wanted)
        except Exception:
            log.exception("cannot tell what is to be served")
            return False
        if wanted is None or wanted.fingerprint != fingerprint:
            return False
        self.expected = wanted
        self._rung.set()
        return True

    def is_due(self, fingerprint: str) -> bool:
        """Is it on its way, or taken out of memory only until somebody asks?"""
        due = (self.coming.target if self.coming else None, self.resting, self.expected)
        return any(target is not None and target.fingerprint == fingerprint for target in due)

    def takes(self, fingerprint: str) -> bool:
        """Can it be asked now? fingerprint "": whatever is served."""
        running = self.current
        return (
            running is not None
            and running.accepting
            and fingerprint in ("", running.target.fingerprint)
        )

    async def rest(self) -> None:
        """Takes the served checkpoint out of memory until somebody asks for it."""
        running = self.current
        if running is None or self.coming is not None:
            return
        log.info("checkpoint %s leaves memory until somebody asks for it", running.target.name)
        self.current, self.resting = None, running.target
        self.house.tell_change()
        await running.close()
        del running
        await self._released()

    async def _released(self) -> None:
        """Something has left memory."""
        await asyncio.to_thread(self.supply.release)
        await asyncio.to_thread(self.supply.keep, self._in_memory())

    def _in_memory(self) -> list[Target]:
        found = [running.target for running in self._retiring]
        if self.current is not None:
            found.append(self.current.target)
        if self.coming is not None and self.coming.phase != PAUSED:
            found.append(self.coming.target)
        return found

    async def close(self) -> None:
        for task in self._retiring.values():
            task.cancel()
        running = [*self._retiring, *([self.current] if self.current else [])]
        await asyncio.gather(*(each.close() for each in running))

    # -- a change

    async def _begin(self, target: Target) -> bool:
        """Changes to it, or waits for a run to give its memory back: then what is served stays.
        False when nothing is served after it.
        """
        if await asyncio.to_thread(self.supply.reserve, target):
            return await self._change(target)
        if self.coming is None or self.coming.target.key != target.key:
            log.info("checkpoint %s waits for memory that a run has", target.name)
            self.coming, self.resting = Coming(target, PAUSED), None
            self.house.tell_change()
        return True

    async def _leave(self, running: Running) -> None:
        """Out of memory for a run, after the running answers; `follow` brings it back."""
        log.info("checkpoint %s leaves memory for a run", running.target.name)
        self.coming = Coming(running.target, PAUSED)
        await self._drain(running)

    async def _change(self, target: Target) -> bool:
        """False when nothing is served after it."""
        begun = time.monotonic()
        try:
            running, sentence = await self._prepared(target)
        except Exception as error:
            log.exception("the checkpoint %s cannot be served", target.name)
            # their frames hold what was loaded
            error.__traceback__ = error.__cause__ = error.__context__ = None
            return await self._take_back(target, error)
        seconds = time.monotonic() - begun
        log.info("checkpoint %s is ready after %.1f s", target.name, seconds)
        old, self.current, self.coming, self.resting = self.current, running, None, None
        if old is not None:
            old.accepting = False
            self._retiring[old] = asyncio.create_task(self._retire(old))
        self.house.tell_change()
        await asyncio.to_thread(self.supply.succeeded, target, sentence, seconds)
        return True

    async def _prepared(self, target: Target) -> tuple[Running, str]:
        self.coming = Coming(target)
        old = self.current
        if old is not None and not await asyncio.to_thread(self.supply.fits_beside, target):
            await self._enter("draining")
            await self._drain(old)
        del old
        await self._enter("loading")
        engine = await asyncio.to_thread(self.supply.load, target)
        try:
            await self._enter("checking")
            sentence = await asyncio.to_thread(self.supply.try_out, engine)
        except BaseException:
            await asyncio.to_thread(engine.close)
            raise
        return Running(target, engine, self.house.give_up), sentence

    async def _enter(self, phase: str) -> None:
        assert self.coming is not None
        self.coming.phase = phase
        self.house.tell_change()
        await asyncio.to_thread(self.supply.tell, self.coming.target, phase)

    async def _take_back(self, target: Target, error: Exception) -> bool:
        """After a change that failed: what was served stays, or comes back."""
        await asyncio.to_thread(self.supply.release)
        instead = await asyncio.to_thread(self.supply.failed, target, error)
        self.coming = None
        await asyncio.to_thread(self.supply.keep, self._in_memory())
        if instead is None or instead.key == target.key:
            self._refused, instead = target.key, None
        if self.current is None and instead is not None:
            self.coming = Coming(instead)
        self.house.refuse_waiting(target, error)
        self.house.tell_change()
        if self.current is not None:
            return True
        if instead is None:
            self.house.give_up(str(error))
            return False
        return await self._begin(instead)

    async def _drain(self, running: Running) -> None:
        """Out of memory, after its answers."""
        running.accepting = False
        self.house.tell_change()
        await self._wait_for_end(running, DRAIN)
        self.house.blame(running, "replaced")
        self.current = None
        await running.close()
        del running
        await self._released()

    async def _retire(self, running: Running) -> None:
        await self._wait_for_end(running, RETIRE)
        self.house.blame(running, "replaced")
        await running.close()
        del self._retiring[running]
        name = running.target.name
        del running
        await self._released()
        log.info("checkpoint %s has left memory", name)

    async def _wait_for_end(self, running: Running, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.house.is_busy(running):
            await asyncio.sleep(0.1)
