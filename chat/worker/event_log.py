"""The events of one generation, kept so that readers may come, leave and come back. No torch."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from typing import Generic, TypeVar

from chat.engine.request import Event


class EventLog:
    """Append-only; one thread appends, any thread reads. Entry i has the sequence number i + 1."""

    __slots__ = ("characters", "entries", "id")

    def __init__(self, id: str):
        self.id = id
        self.entries: list[Event] = []
        self.characters = 0  # of text held, so that an owner of many logs can bound its memory

    def append(self, event: Event) -> None:
        """Takes the sequence's next event; ValueError when one is missing, repeated or follows the
        terminal one.
        """
        if event.seq != len(self.entries) + 1 or self.ended:
            raise ValueError(
                f"sequence {self.id}: event {event.seq} after {len(self.entries)} events, "
                f"{self.ended=}"
            )
        self.entries.append(event)
        if event.type == "delta":
            self.characters += len(event.data["text"])

    @property
    def last(self) -> int:
        return len(self.entries)

    @property
    def ended(self) -> bool:
        return bool(self.entries) and self.entries[-1].terminal

    def since(self, after: int) -> list[Event]:
        """What came after sequence number `after`, with neighbouring deltas made one: a late reader
        costs one frame.
        """
        news = self.entries[after:]
        return news if len(news) < 2 else list(coalesced(news))


class FollowedLog(EventLog):
    """A log with readers on an event loop: `followers` are called, on the loop's thread, when
    `notify` says that it has grown.
    """

    __slots__ = ("followers",)

    def __init__(self, id: str):
        super().__init__(id)
        self.followers: set[Callable[[], None]] = set()

    def notify(self) -> None:
        for follower in tuple(self.followers):
            follower()

    async def follow(self, after: int = 0) -> AsyncGenerator[list[Event], None]:
        """The events after number `after` as they come, in handfuls, up to the terminal one."""
        grown = asyncio.Event()
        self.followers.add(grown.set)
        try:
            while True:
                grown.clear()  # before looking: a later event sets it again
                news = self.since(after)
                if news:
                    after = news[-1].seq
                    yield news
                if after >= self.last:
                    if self.ended:
                        return
                    await grown.wait()
        finally:
            self.followers.discard(grown.set)


Log = TypeVar("Log", bound=EventLog)


class Doorbell(Generic[Log]):
    """How another thread tells the event loop that logs have grown: one wake-up for all that grew
    since the loop last looked. `answer` is called with each, on the loop's thread.
    """

    def __init__(self, answer: Callable[[Log], None]):
        self._loop = asyncio.get_running_loop()
        self._answer = answer
        self._grown: deque[Log] = deque()
        self._rung = False

    def ring(self, log: Log) -> None:
        """On any thread; does not wait."""
        self._grown.append(log)
        if not self._rung:
            self._rung = True
            # After the end of the loop there is nobody left to tell.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.look)

    def look(self) -> None:
        self._rung = False  # before looking: a later log rings again
        while self._grown:
            self._answer(self._grown.popleft())


def coalesced(events: Iterable[Event]) -> Iterator[Event]:
    """The same events with runs of deltas joined; a joined delta has the number of its last
    part.
    """
    run: list[Event] = []
    for event in events:
        if event.type == "delta":
            run.append(event)
            continue
        if run:
            yield _joined(run)
            run = []
        yield event
    if run:
        yield _joined(run)


def _joined(run: list[Event]) -> Event:
    last = run[-1]
    if len(run) == 1:
        return last
    data = {
        "text": "".join(part.data["text"] for part in run),
        "tokens": sum(part.data["tokens"] for part in run),
    }
    logprobs = [entry for part in run for entry in part.data.get("logprobs") or ()]
    if logprobs:
        data["logprobs"] = logprobs
    return Event(last.id, last.seq, "delta", data)
