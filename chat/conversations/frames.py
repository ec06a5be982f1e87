"""An answer as this process knows it, and the frames that readers of it get.

Readers hold on to the offset of the last frame they saw (`seq` in the frame and in the row; not the
seq of the worker's events). Offsets mean the same before and after a restart, in every web process,
and when nothing but the row is left: a frame's offset says how much of the text it ends.

    1 ... 998        its model is loaded, then queued: rising with each news of it
    999              started
    1000 + n         text up to its n-th character
    1001 + n         the end, after n characters
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from chat.conversations.rendering import to_html
from chat.conversations.streaming import StreamedMarkdown
from chat.engine.request import Event, interrupted
from chat.models import Message

STARTED, TEXT = 999, 1000
# Characters in a frame: the web server sends none above 1 MiB, and a reader acknowledges between
# two of them.
LONGEST_TEXT, LONGEST_HTML = 32 * 1024, 128 * 1024
ENDINGS = ("message.finished", "message.failed")
Status = Message.Status


@dataclass(eq=False)
class LiveAnswer:
    """Written on the thread that follows the worker, read on any."""

    message_id: int
    sequence: str
    content: str = ""
    status: str = Status.QUEUED
    position: int | None = None  # in the queue; 0 is next
    loading: dict[str, Any] | None = None  # what it waits for: data of the newest loading event
    position_offset: int = 0  # of the frame that told it
    finish_reason: str = ""
    usage: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    left_out: int = 0  # earlier turns that did not fit
    html: str = ""
    # for readers who asked for it
    rendered: StreamedMarkdown = field(default_factory=StreamedMarkdown)
    ended: bool = False  # set last, when the row has been written
    readers: set[Reader] = field(default_factory=set)
    _replayed: str = ""  # the text as the worker's log tells it, from the beginning

    @classmethod
    def of_row(cls, message: Message) -> LiveAnswer:
        """What the row knows; ended unless it is in flight."""
        ended = not message.is_in_flight
        return cls(
            message.pk,
            str(message.sequence),
            message.content,
            message.status,
            _replayed=message.content[: message.begun],
            finish_reason=message.finish_reason,
            usage=message.usage,
            timings=message.timings,
            error=message.error,
            left_out=message.left_out,
            html=to_html(message.content) if ended else "",
            ended=ended,
        )

    @property
    def offset(self) -> int:
        """Of the newest frame: what the row keeps."""
        if self.status not in Message.IN_FLIGHT:
            return TEXT + len(self.content) + 1
        if self.content and self.status != Status.QUEUED:
            return TEXT + len(self.content)
        return STARTED if self.status == Status.STREAMING else self.position_offset

    def take(self, event: Event) -> None:
        """The next event of the worker's log."""
        if event.type == "loading":
            self.loading = event.data
            self.position_offset = min(self.position_offset + 1, STARTED - 1)
        elif event.type == "queued" and event.data["position"] != self.position:
            self.position, self.loading = event.data["position"], None
            self.position_offset = min(self.position_offset + 1, STARTED - 1)
        elif event.type == "started":
            self.status = Status.STREAMING
        elif event.type == "delta":
            self.status = Status.STREAMING
            self._replayed += event.data["text"].replace("\0", "")  # PostgreSQL stores no NUL
            # else the row had more already, from before a restart
            if len(self._replayed) > len(self.content):
                self.content = self._replayed
        elif event.terminal:
            self._end(event)

    def _end(self, event: Event) -> None:
        self.usage, self.timings = event.data.get("usage"), event.data.get("timings")
        if event.type == "failed":
            self.status, self.finish_reason, self.error = (
                Status.FAILED,
                "error",
                event.data["error"],
            )
            return
        self.finish_reason = event.data["finish_reason"]
        cause = event.data.get("cause")
        if cause:  # the worker ended it: nobody asked for that
            self.interrupt(f"the worker ended the answer: {cause}")
        else:
            self.status = Status.STOPPED if self.finish_reason == "abort" else Status.COMPLETE

    def interrupt(self, message: str) -> None:
        self.status, self.finish_reason = Status.INTERRUPTED, "abort"
        self.error = interrupted(message)

    def fail(self, error: dict[str, Any]) -> None:
        self.status, self.finish_reason, self.error = Status.FAILED, "error", error

    def render(self) -> None:
        """At the end, before `ended` is set."""
        self.html = to_html(self.content)
        if self.rendered.version:
            self.rendered.finish(self.content, self.html)

    def frames(self, after: int, view: View | None = None) -> list[dict[str, Any]]:
        """What a reader who saw frame `after` has missed, in as few frames as possible; of a long
        text only the next part. `view`: of a reader who wants it rendered.

        The end is repeated for whoever asks, so that every reading of an ended answer ends with it.
        """
        ended, content = self.ended, self.content  # the end first: its text is complete
        if self.status == Status.QUEUED:  # what it goes on with is told when it does
            content = ""
        found = []
        common = {"message": self.message_id}
        queued = self.status == Status.QUEUED and after < self.position_offset
        if queued and self.loading is not None:
            told = {"seq": self.position_offset, **common, **self.loading}
            found.append({"type": "message.loading", **told})
        elif queued and self.position is not None:
            found.append(
                {
                    "type": "message.queued",
                    "seq": self.position_offset,
                    **common,
                    "position": self.position,
                }
            )
        if after < STARTED and (content or self.status == Status.STREAMING):
            told = {"left_out": self.left_out} if self.left_out else {}
            found.append({"type": "message.started", "seq": STARTED, **common, **told})
        if view is not None and view.version != self.rendered.version:
            return [*found, self._rendered_frame(common, view, content)]
        begin = max(0, after - TEXT)
        end = min(len(content), begin + LONGEST_TEXT)
        if begin < end:
            found.append(
                {"type": "message.delta", "seq": TEXT + end, **common, "text": content[begin:end]}
            )
        if ended and end == len(content):
            found.append(self._terminal_frame(common, view))
        return found

    def _rendered_frame(self, common: dict[str, Any], view: View, content: str) -> dict[str, Any]:
        """Blocks that have ended since the last one, the open block, and the text in or behind it;
        of many blocks only the next.
        """
        with self.rendered.lock:
            if view.epoch != self.rendered.epoch:
                view.blocks, view.epoch = 0, self.rendered.epoch
            first, closed = view.blocks, self.rendered.closed[view.blocks :]
            html, end = "", 0
            while closed and (not html or len(html) + len(closed[0][0]) <= LONGEST_HTML):
                piece, end = closed.pop(0)
                html, view.blocks = html + piece, view.blocks + 1
            frame = {"type": "message.rendered", **common, "from": first, "html": html}
            frame |= {"open": "", "code": False, "text": ""}
            if not closed:
                view.version = self.rendered.version
                begin = self.rendered.text_from
                end = min(len(content), begin + LONGEST_TEXT)
                frame |= {"open": self.rendered.open_html, "code": self.rendered.in_code}
                frame["text"] = content[begin:end]
        return frame | {"seq": TEXT + end}

    def _terminal_frame(self, common: dict[str, Any], view: View | None) -> dict[str, Any]:
        # Empty: a reader who has it rendered has all of it; another keeps the text until the page
        # is loaded anew.
        told = view is not None and view.version
        html = self.html if len(self.html) <= LONGEST_HTML and not told else ""
        frame = {"seq": self.offset, **common, "status": str(self.status), "html": html}
        frame |= {"finish_reason": self.finish_reason, "usage": self.usage, "timings": self.timings}
        if self.error is not None:
            return {"type": "message.failed", **frame, "error": self.error}
        return {"type": "message.finished", **frame}


@dataclass
class View:
    """What a reader has of the rendered answer."""

    version: int = 0
    epoch: int = 0
    blocks: int = 0


class Reader:
    """Somebody who waits for frames on an event loop of their own."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self.told = False  # a bell is under way, another is not needed

    def listen(self) -> None:
        """To be called before looking for frames."""
        self._news.clear()
        self.told = False

    def ring(self) -> None:
        self._news.set()

    async def wait(self) -> None:
        await self._news.wait()
