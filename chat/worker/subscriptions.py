"""The worker's side of a reader: a sequence's log, a client's subscription to it, and the task that
writes what is new to the client. Everything here belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from aiohttp import web

from chat.worker import wire
from chat.worker.event_log import FollowedLog
from chat.worker.serving import Running

# seconds between two frames to one client: joins what other threads deliver one by one
FRAME_GAP = 0.003


class SequenceState(FollowedLog):
    """A sequence's log, and what becomes of it. cause: why the worker itself ended the sequence,
    added to its terminal event. unread_since, ended_at: time.monotonic(). running: whose it is,
    until it ends. notices: events of the worker's own that came before the engine's.
    """

    __slots__ = ("cause", "ended_at", "notices", "running", "unread_since", "user")

    def __init__(self, id: str, user: str):
        super().__init__(id)
        self.user = user
        self.running: Running | None = None
        self.notices = 0
        self.unread_since: float | None = None
        self.ended_at: float | None = None
        self.cause: str | None = None


class Subscription:
    """One reading of a sequence by a client; `after` is the last event that was put into a frame
    for it.
    """

    __slots__ = ("after", "client", "number", "sequence")

    def __init__(self, client: Client, number: int, sequence: SequenceState, after: int):
        self.client, self.number, self.sequence, self.after = client, number, sequence, after
        client.subscriptions[number] = self
        sequence.followers.add(self.notice)
        sequence.unread_since = None

    def notice(self) -> None:
        """There may be something to read."""
        self.client.notice(self)

    @property
    def active(self) -> bool:
        return self.notice in self.sequence.followers

    def leave(self) -> None:
        self.client.subscriptions.pop(self.number, None)
        self.sequence.followers.discard(self.notice)
        if not self.sequence.followers and not self.sequence.ended:
            self.sequence.unread_since = time.monotonic()


class Client:
    """One websocket: what it reads, and the task that writes its frames."""

    def __init__(self, socket: web.WebSocketResponse):
        self.socket = socket
        self.subscriptions: dict[int, Subscription] = {}
        # those that may have something to read, in order of arrival
        self.pending: dict[Subscription, None] = {}
        self.control: list[dict[str, Any]] = []  # frames other than events
        self.wake = asyncio.Event()

    def tell(self, frame: dict[str, Any]) -> None:
        self.control.append(frame)
        self.wake.set()

    def notice(self, subscription: Subscription) -> None:
        self.pending[subscription] = None
        self.wake.set()

    async def write(self) -> None:
        while True:
            await self.wake.wait()
            self.wake.clear()
            control, self.control = self.control, []
            for frame in control:
                await self.socket.send_str(wire.encode(frame))
            pending, self.pending = self.pending, {}
            events = []
            for subscription in pending:
                if not subscription.active:
                    continue
                for event in subscription.sequence.since(subscription.after):
                    events.append([subscription.number, event.seq, event.type, event.data])
                    subscription.after = event.seq
                if subscription.sequence.ended:
                    subscription.leave()
            if events:
                await self.socket.send_str(wire.encode({"events": events}))
                await asyncio.sleep(FRAME_GAP)
