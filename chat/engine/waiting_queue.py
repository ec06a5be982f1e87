"""Who is next: a bounded waiting line, fair between users (round-robin), first come first served
for each.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    @property
    def user(self) -> str: ...


T = TypeVar("T", bound=Waiting)


class WaitingQueue(Generic[T]):
    """Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self._users: OrderedDict[str, deque[T]] = OrderedDict()  # in turn; the first is served next
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, item: T) -> None:
        self._users.setdefault(item.user, deque()).append(item)
        self._size += 1

    def count(self, user: str) -> int:
        """How many of a user's items wait."""
        return len(self._users.get(user, ()))

    def peek(self) -> T | None:
        return next(iter(self._users.values()))[0] if self._users else None

    def pop(self) -> T:
        """Take the next one; its user goes to the end of the line."""
        user, items = next(iter(self._users.items()))
        item = items.popleft()
        del self._users[user]
        if items:
            self._users[user] = items
        self._size -= 1
        return item

    def remove(self, item: T) -> None:
        items = self._users[item.user]
        items.remove(item)
        if not items:
            del self._users[item.user]
        self._size -= 1

    def __iter__(self) -> Iterator[T]:
        """In the order in which they will be served if nobody else comes."""
        turns = deque(deque(items) for items in self._users.values())
        while turns:
            items = turns.popleft()
            yield items.popleft()
            if items:
                turns.append(items)
