"""Where something that needs memory goes: the arbiter's decision as a pure function.

A run has its devices for itself among runs (two of them on one card would only take turns); chat
may stand beside it where the memory suffices. Whoever waits goes first on every device that could
ever do for it, so a large run is not passed by small ones for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

CHAT = "chat"
# Policies, where a run does not fit beside chat. ANY: memory is not counted at all.
ANY, QUEUE, SHRINK, PAUSE = "any", "queue", "shrink", "pause"
POLICIES = (ANY, QUEUE, SHRINK, PAUSE)


@dataclass(frozen=True)
class Wish:
    """holder: "run:12", or a worker's address. use: CHAT or the run's kind. bytes: that it needs;
    least: that it can do with (a run with smaller batches). names: the devices it may lie on, all
    if empty. together: on all of them, each with its share.
    """

    holder: str
    use: str
    bytes: int
    least: int
    names: tuple[str, ...] = ()
    together: bool = False

    def may_use(self, device: Place) -> bool:
        return not self.names or device.name in self.names


@dataclass(frozen=True)
class Held:
    holder: str
    use: str
    bytes: int


@dataclass(frozen=True)
class Place:
    """A device and what lies on it. usable: it is there, and nobody took it out of service."""

    name: str
    bytes: int
    usable: bool = True
    held: tuple[Held, ...] = ()


@dataclass(frozen=True)
class Granted:
    """Bytes on each device, by name; `bytes` may be less than was asked for (SHRINK)."""

    shares: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.shares.values())


@dataclass(frozen=True)
class Refused:
    """Why not now. `code`: no_device | too_large | gone | behind | busy | memory. device: the one
    that comes nearest. holders: who is in the way. pausable: those of them that, asked to leave,
    would make it fit.
    """

    code: str
    device: str = ""
    free: int = 0
    total: int = 0
    holders: tuple[str, ...] = ()
    pausable: tuple[str, ...] = field(default=())


_NEAREST = ("memory", "busy", "behind", "gone", "too_large")


def choose(
    wish: Wish, places: Sequence[Place], ahead: Sequence[Wish] = (), policy: str = QUEUE
) -> Granted | Refused:
    """ahead: who waits longer, the first first."""
    refusals: list[Refused] = []
    grants: list[tuple[tuple[int, int, int], Granted]] = []
    options = _options(wish, places, policy)
    for number, option in enumerate(options):
        outcome = _on(wish, option, ahead, policy)
        if isinstance(outcome, Refused):
            refusals.append(outcome)
        else:
            taken = sum(len(place.held) for place in option)
            grants.append(((-outcome.bytes, taken, number), outcome))
    if grants:
        return min(grants, key=lambda grant: grant[0])[1]
    if not refusals:
        return Refused("no_device")
    return min(refusals, key=lambda each: (_NEAREST.index(each.code), -each.free))


def _options(wish: Wish, places: Sequence[Place], policy: str) -> list[tuple[Place, ...]]:
    """Sets of devices, on any of which it may lie: one each; all cards where one is too small."""
    candidates = tuple(place for place in places if wish.may_use(place))
    if not candidates:
        return []
    if wish.together:
        return [candidates]
    if policy != ANY and all(wish.least > place.bytes for place in candidates):
        cards = tuple(place for place in candidates if place.name.startswith("cuda"))
        return [cards] if len(cards) > 1 else [(place,) for place in candidates]
    return [(place,) for place in candidates]


def _on(
    wish: Wish, option: tuple[Place, ...], ahead: Sequence[Wish], policy: str
) -> Granted | Refused:
    name = "+".join(place.name for place in option)
    total = sum(place.bytes for place in option)
    others = [held for place in option for held in place.held if held.holder != wish.holder]
    free = total - sum(held.bytes for held in others)
    counted = policy != ANY

    def refused(code: str, holders: Sequence[str] = (), pausable: Sequence[str] = ()) -> Refused:
        return Refused(code, name, max(free, 0), total, tuple(holders), tuple(pausable))

    if counted and wish.least > total:
        return refused("too_large")
    if not all(place.usable for place in option):
        return refused("gone")
    first = [
        each.holder
        for each in ahead
        if any(each.may_use(place) for place in option) and not (counted and each.least > total)
    ]
    if first:
        return refused("behind", first)
    runs = [held.holder for held in others if held.use != CHAT]
    if runs and wish.use != CHAT:
        return refused("busy", runs)
    if not counted:
        return Granted(_shares(option, wish.bytes))
    enough = wish.least if policy == SHRINK else wish.bytes
    if free < enough:
        chats = [held for held in others if held.use == CHAT]
        would = free + sum(held.bytes for held in chats) >= enough
        leave = [held.holder for held in chats] if wish.use != CHAT and would else []
        return refused("memory", [held.holder for held in others], leave)
    return Granted(_shares(option, min(wish.bytes, free)))


def _shares(option: tuple[Place, ...], count: int) -> dict[str, int]:
    """`count` bytes over the devices as they are large; whole bytes that add up to it."""
    total = sum(place.bytes for place in option)
    ends = [count * upto // total for upto in accumulate(place.bytes for place in option)]
    starts = [0, *ends]
    return {
        place.name: end - start for place, start, end in zip(option, starts, ends, strict=False)
    }


def torch_device(names: Sequence[str]) -> str:
    """What was granted as torch calls it: several cards share the layers, processors are one."""
    first = names[0]
    return first if len(names) == 1 and first.startswith("cuda") else first.partition(":")[0]
