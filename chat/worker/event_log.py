"""The events of one generation, kept so that readers may come, leave and come back. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
