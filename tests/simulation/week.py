"""Discrete events around the real code: rows of runs, their order (portal/runs/waiting.py),
claiming and ending them (portal/runs/lifecycle.py), and the devices' arbiter. Only the clock, the
arrivals and how long a run takes are invented; nothing sleeps.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from unittest import mock

from django.db.models import Sum
from django.utils import timezone

from portal.devices import arbiter
from portal.devices.models import Device, DeviceClaim
from portal.devices.placing import CHAT, Granted, Wish
from portal.models import Run, User
from portal.runs import lifecycle

GB = 10**9
HOST, QUEUE, HOUR = "simulated", "gpu", 3600.0
BEGIN = datetime(2026, 3, 2, tzinfo=UTC)  # a Monday, midnight
# cards of three sizes, in turn; chat lies on the first two
SIZES = (80, 48, 24, 24)
CHAT_NEEDS = 20
SWEEP = 12  # runs that somebody who tries hyper-parameters starts at once
MINUTES, SPREAD = 16.0, 1.0  # median length of a run; sigma of its logarithm
LONGEST = 12 * HOUR


@dataclass(frozen=True)
class Arrival:
    at: float  # seconds since BEGIN
    member: int
    seconds: float
    needs: int  # bytes
    low: bool


def arrivals(members: int, days: int, runs: int, seed: int) -> list[Arrival]:
    """A few members start most of them; by day five times as many as at night; one start in twenty
    is a sweep; one run in twenty lets others first.
    """
    draw = random.Random(seed)
    eager = [1 / (1 + rank) ** 0.8 for rank in range(members)]
    found: list[Arrival] = []
    while len(found) < runs:
        at = draw.uniform(0, days * 24 * HOUR)
        if draw.random() > (1.0 if 9 <= at / HOUR % 24 < 21 else 0.2):
            continue
        (member,) = draw.choices(range(members), eager)
        for _each in range(SWEEP if draw.random() < 0.05 else 1):
            seconds = min(LONGEST, draw.lognormvariate(math.log(MINUTES * 60), SPREAD))
            needs = int(draw.choice([3, 6, 6, 10, 14, 20, 40]) * GB)
            found.append(Arrival(at, member, seconds, needs, draw.random() < 0.05))
    return sorted(found[:runs], key=lambda arrival: arrival.at)


@dataclass
class Outcome:
    """waits: seconds between the click and the device, by member. busy: device-seconds of runs in
    each hour. passed: most often that one member was passed by another one while waiting with
    nothing running.
    """

    devices: int
    days: int
    waits: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    low_waits: list[float] = field(default_factory=list)
    busy: Counter[int] = field(default_factory=Counter)
    passed: int = 0
    refused: int = 0
    finished: int = 0
    longest_line: int = 0
    ended_at: float = 0.0

    def utilisation(self) -> float:
        """Of the devices' time, while runs arrived."""
        hours = self.days * 24
        return sum(self.busy[hour] for hour in range(hours)) / (self.devices * hours * HOUR)

    def of_persons(self) -> dict[str, list[float]]:
        """Each person's median, 95 % and worst wait, in seconds, ascending."""
        every = [sorted(waits) for waits in self.waits.values()]
        return {
            "median": sorted(statistics.median(waits) for waits in every),
            "p95": sorted(waits[math.ceil(0.95 * len(waits)) - 1] for waits in every),
            "worst": sorted(waits[-1] for waits in every),
        }


class Week:
    """`simulate` needs an empty database."""

    def __init__(self, members: int, devices: int, days: int, runs: int, seed: int):
        self._arrivals = arrivals(members, days, runs, seed)
        self._members = User.objects.bulk_create(User(username=f"m{n}") for n in range(members))
        self._now = 0.0
        with self._clock():
            self._cards = Device.objects.bulk_create(
                Device(host=HOST, name=f"cuda:{n}", bytes=SIZES[n % 4] * GB, declared=True)
                for n in range(devices)
            )
            for number in range(min(2, devices)):
                name, needs = f"cuda:{number}", CHAT_NEEDS * GB
                arbiter.ask(
                    Wish(f"worker:{number}", CHAT, needs, needs, (name,)),
                    label="chat",
                    machine=HOST,
                )
        self.outcome = Outcome(devices, days)
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Arrival | int]] = []  # what arrives, or which run ends
        self._asked: dict[int, Arrival] = {}  # run id -> what it is
        self._tokens: dict[int, str] = {}
        self._lining_up: list[int] = []  # claimed, without a device yet
        self._computing: set[int] = set()
        self._waiting: dict[int, set[int]] = defaultdict(set)  # member -> queued runs, not low
        self._passes: dict[int, Counter[int]] = defaultdict(Counter)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        with (
            mock.patch.object(timezone, "now", lambda: BEGIN + timedelta(seconds=self._now)),
            mock.patch.object(lifecycle, "ring"),
        ):
            yield

    def simulate(self) -> Outcome:
        for arrival in self._arrivals:
            heapq.heappush(self._events, (arrival.at, next(self._numbers), arrival))
        with self._clock():
            while self._events:
                self._now, _number, event = heapq.heappop(self._events)
                if isinstance(event, Arrival):
                    self._arrive(event)
                else:
                    self._end(event)
                if not self._events or self._events[0][0] > self._now:
                    self._begin_what_can()
                    self._check_memory()
        self.outcome.ended_at = self._now
        assert not Run.objects.filter(status__in=Run.ACTIVE).exists(), "somebody never had a turn"
        return self.outcome

    def _arrive(self, arrival: Arrival) -> None:
        run = Run(
            owner=self._members[arrival.member],
            kind=Run.Kind.TUNING,
            name="run",
            priority=Run.Priority.LOW if arrival.low else Run.Priority.NORMAL,
        )
        try:
            lifecycle.enqueue(run)
        except lifecycle.TooManyQueued:
            self.outcome.refused += 1
            return
        self._asked[run.pk] = arrival
        if not arrival.low:
            self._waiting[arrival.member].add(run.pk)

    def _begin_what_can(self) -> None:
        """What the queue's workers do: each with nothing to do claims the next and asks for a
        device.
        """
        for run_id in self._computing | set(self._lining_up):
            lifecycle.heartbeat(run_id, self._tokens[run_id])
        while len(self._computing) + len(self._lining_up) < len(self._cards):
            claimed = lifecycle.claim_next(QUEUE)
            if claimed is None:
                break
            run_id, self._tokens[run_id] = claimed
            self._lining_up.append(run_id)
            self._note_turn(run_id)
        self._lining_up = [run_id for run_id in self._lining_up if not self._given(run_id)]
        waiting = Run.objects.filter(status=Run.Status.QUEUED).count()
        self.outcome.longest_line = max(self.outcome.longest_line, waiting)

    def _note_turn(self, run_id: int) -> None:
        """No normal run waits while a low one begins; whoever waits with nothing running is passed
        by another only so often.
        """
        arrival = self._asked[run_id]
        if arrival.low:
            assert not any(self._waiting.values()), "a low run went before a normal one"
            return
        self._waiting[arrival.member].discard(run_id)
        self._passes.pop(arrival.member, None)
        served = {self._asked[each].member for each in self._computing | set(self._lining_up)}
        for member, queued in self._waiting.items():
            if queued and member != arrival.member and member not in served:
                self._passes[member][arrival.member] += 1
                most = self._passes[member][arrival.member]
                self.outcome.passed = max(self.outcome.passed, most)

    def _given(self, run_id: int) -> bool:
        arrival = self._asked[run_id]
        run = Run.objects.get(pk=run_id)
        wish = Wish(arbiter.holder_of(run), run.kind, arrival.needs, arrival.needs)
        outcome = arbiter.ask(wish, run=run, token=self._tokens[run_id], machine=HOST)
        if not isinstance(outcome, Granted):
            return False
        wait = self._now - arrival.at
        if arrival.low:
            self.outcome.low_waits.append(wait)
        else:
            self.outcome.waits[arrival.member].append(wait)
        self._computing.add(run_id)
        end = self._now + arrival.seconds
        heapq.heappush(self._events, (end, next(self._numbers), run_id))
        self._count_busy(self._now, end, len(outcome.shares))
        return True

    def _count_busy(self, start: float, end: float, devices: int) -> None:
        while start < end:
            hour = int(start // HOUR)
            until = min(end, (hour + 1) * HOUR)
            self.outcome.busy[hour] += devices * (until - start)  # type: ignore[assignment]
            start = until

    def _end(self, run_id: int) -> None:
        token = self._tokens[run_id]
        lifecycle.heartbeat(run_id, token)
        lifecycle.succeed(run_id, token)
        arbiter.release(f"run:{run_id}", token)
        self._computing.discard(run_id)
        self.outcome.finished += 1

    def _check_memory(self) -> None:
        held = DeviceClaim.objects.exclude(device=None).values("device__bytes", "device")
        for row in held.order_by().annotate(held=Sum("bytes")):
            assert row["held"] <= row["device__bytes"], "memory was given twice"
