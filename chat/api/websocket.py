"""The chat socket, /ws/conversations/{id}/: authenticate, look up through visible_to, forward.
docs/api.md has the frames.
"""

import asyncio
import contextlib
import json
import logging
from collections import Counter, deque
from typing import ClassVar

from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from django.core.exceptions import ValidationError
from django.db import DatabaseError
from django.utils.translation import gettext as _
from rest_framework.exceptions import APIException

from chat.api import errors
from chat.api.token_bucket import TokenBucket
from chat.conversations import live, turns
from chat.engine.request import GenerationRefused
from chat.models import Conversation, Message
from portal.logins import Login, ended, login_of
from portal.models import ApiKey, User
from portal.outages import outage_of
from portal.rest import conventions
from portal.rest.api_keys import KeyRefused, check_key
from portal.rest.json_bodies import json_of

logger = logging.getLogger(__name__)

# bytes sent and not acknowledged: between here and the page are buffers that hide a slow reader
WINDOW = 256 * 1024
LARGEST_FRAME = 1024 * 1024  # characters from a client
MOST_ATTACHED = 8  # answers that one socket follows at once
MOST_SOCKETS = 64  # of one user in this process
BURST, RATE = 50, 10  # frames at once, and then a second
CHARACTERS_A_TOKEN = 32 * 1024  # what a frame's length costs: parsing holds everybody up
FREE_ACK = 200  # characters
NOT_LOGGED_IN, NOT_IN_SCOPE, NOT_YOURS, TOO_SLOW = 4401, 4403, 4404, 4408
# codes of applications: the server sends no other ones
TOO_LARGE, TOO_OFTEN = 4413, 4429


class Refused(Exception):
    """What the client asked for cannot be done; `error` is sent to it."""

    def __init__(self, error: dict):
        self.error = error


def refused(message: str, code: str, param: str | None = None) -> Refused:
    return Refused(conventions.error(message, code=code, param=param)["error"])


def parsed(text: str):
    try:
        return json_of(text)
    except ValueError as error:
        raise refused(_("This is not JSON."), "not_json") from error


class ConversationConsumer(AsyncWebsocketConsumer):
    open_sockets: ClassVar[Counter[int]] = Counter()  # by user, in this process

    async def connect(self):
        self.followed: dict[int, asyncio.Task] = {}
        # (message, seq, bytes), in the order sent
        self.unacknowledged: deque[tuple[int, int, int]] = deque()
        self.window = 0
        self.user = self.scope.get("user")
        self.conversation_id = self.scope["url_route"]["kwargs"]["pk"]
        self.watch: asyncio.Task | None = None
        self.bucket, self.acknowledgeable = TokenBucket(BURST, RATE), 0
        self.closing = False
        await self.accept()  # a close code reaches the page only after accepting
        if self.user is None or not self.user.is_authenticated:
            return await self.close(NOT_LOGGED_IN)
        key = getattr(self.user, "api_key", None)
        if key is not None and ApiKey.Scope.CHAT not in key.scopes:
            return await self.close(NOT_IN_SCOPE)
        if not await database_sync_to_async(self.conversation)():
            return await self.close(NOT_YOURS)
        if self.open_sockets[self.user.pk] >= MOST_SOCKETS:
            return await self.close(TOO_OFTEN)
        login = login_of(self.user, self.scope.get("session"))
        self.open_sockets[login.user] += 1
        self.watch = asyncio.create_task(self.close_after(login))
        self.member = login.user

    async def close_after(self, login: Login) -> None:
        await ended(login)
        await self.close(NOT_LOGGED_IN)

    async def close(self, code=None, reason=None) -> None:
        """Nothing may be sent after it, and nothing is heard."""
        if self.closing:
            return
        self.closing = True
        for task in self.followed.values():
            if task is not asyncio.current_task():
                task.cancel()
        await super().close(code, reason)

    async def disconnect(self, code):
        if self.watch is not None:
            self.watch.cancel()
            self.open_sockets[self.member] -= 1
            if not self.open_sockets[self.member]:
                del self.open_sockets[self.member]
        for task in self.followed.values():
            task.cancel()

    def may_say(self, text: str) -> bool:
        """Every frame costs, a long one more; what acknowledges a frame of ours is free."""
        if self.acknowledgeable and len(text) < FREE_ACK and '"ack"' in text:
            self.acknowledgeable -= 1
            return True
        return self.bucket.take(1 + len(text) / CHARACTERS_A_TOKEN)

    def conversation(self) -> Conversation | None:
        """Looked up anew: it may have been deleted, or the account closed, since the socket
        opened.
        """
        user = User.objects.filter(pk=self.user.pk).first()
        return Conversation.objects.visible_to(user).filter(pk=self.conversation_id).first()

    @database_sync_to_async
    def turn(self, frame) -> Message | None:
        """The queued answer to a message; None when the conversation is not there.

        One trip to the database's only thread: with several, the first of many who send at once
        waits for the last at each.
        """
        conversation = self.conversation()
        if conversation is None:
            return None
        _message, answer = turns.create_turn(
            conversation,
            self.user,
            frame.get("content"),
            checkpoint=frame.get("checkpoint"),
            adapter=frame.get("adapter", turns.KEEP),
            sampling=frame.get("sampling"),
            with_history=frame.get("with_history"),
            system=frame.get("system"),
        )
        return answer

    @database_sync_to_async
    def message(self, message_id) -> Message:
        found = None
        if (
            isinstance(message_id, int)
            and not isinstance(message_id, bool)
            and 0 < message_id < 2**63
        ):
            messages = Message.objects.visible_to(User.objects.filter(pk=self.user.pk).first())
            found = messages.filter(conversation=self.conversation_id, pk=message_id).first()
        if found is None:
            raise refused(_("There is no such message."), "not_found", "message")
        return found

    async def receive(self, text_data=None, bytes_data=None):
        if self.closing:
            return
        if text_data is not None and len(text_data) > LARGEST_FRAME:
            return await self.close(TOO_LARGE)
        if not self.may_say(text_data or ""):
            return await self.close(TOO_OFTEN)
        try:
            frame = parsed(text_data) if text_data is not None else None
            kind = frame.get("type") if isinstance(frame, dict) else None
            handle = self.handlers.get(kind) if isinstance(kind, str) else None
            if handle is None:
                raise refused(_("This frame is not understood."), "unknown_frame", "type")
            await handle(self, frame)
        except Refused as refusal:
            await self.send_frame({"type": "error", "error": refusal.error})
        except (DatabaseError, OSError) as fault:
            outage = outage_of(fault)
            if outage is None:
                raise
            logger.warning("a frame was not served: %s", fault)
            told = conventions.error(outage.message, type="server_error", code=outage.code)
            await self.send_frame({"type": "error", **told})

    # ---- what a client may say

    async def send_message(self, frame):
        try:
            await database_sync_to_async(check_key)(self.user, "chat")
            answer = await self.turn(frame)
        except KeyRefused as error:
            raise refused(error.message, error.code) from error
        except ValidationError as error:
            raise Refused(errors.object_of(error)) from error
        except APIException as error:
            raise refused(str(error.detail), error.detail.code) from error
        if answer is None:
            return await self.close(NOT_YOURS)
        # the row says why; following it tells the client
        with contextlib.suppress(GenerationRefused):
            await live.start(answer)
        self.follow(answer.pk, 0, frame.get("render") is True)

    async def stop(self, frame):
        message = await self.message(frame.get("message"))
        if message.is_in_flight:
            await live.stop(message.pk)

    async def attach(self, frame):
        after = frame.get("after", 0)
        if not isinstance(after, int) or isinstance(after, bool) or not 0 <= after < 2**63:
            raise refused(_("Must be a whole number."), "invalid", "after")
        message = await self.message(frame.get("message"))
        if message.role != Message.Role.ASSISTANT:
            raise refused(_("There is no such message."), "not_found", "message")
        self.follow(message.pk, after, frame.get("render") is True)

    async def acknowledge(self, frame):
        """Frames arrive in order, so the one named and all before it have been read."""
        seq, message = frame.get("seq"), frame.get("message")
        if not isinstance(seq, int):
            raise refused(_("Must be a whole number."), "invalid", "seq")
        if message is None and self.unacknowledged:
            message = self.unacknowledged[-1][0]
        read = [
            i
            for i, (of, number, _size) in enumerate(self.unacknowledged)
            if of == message and number <= seq
        ]
        for _frame in range(read[-1] + 1 if read else 0):
            self.window -= self.unacknowledged.popleft()[2]

    handlers = {
        "message.send": send_message,
        "message.stop": stop,
        "attach": attach,
        "ack": acknowledge,
    }

    # ---- what it hears

    def follow(self, message_id: int, after: int, rendered: bool) -> None:
        earlier = self.followed.pop(message_id, None)
        if earlier is not None:
            earlier.cancel()
        if len(self.followed) >= MOST_ATTACHED:
            raise refused(_("This page follows too many answers at once."), "too_many")
        self.followed[message_id] = asyncio.create_task(self.forward(message_id, after, rendered))

    async def forward(self, message_id: int, after: int, rendered: bool) -> None:
        frames = live.follow(message_id, after, rendered)
        try:
            async for frame in frames:
                await self.send_frame(frame)
                if self.window > WINDOW:
                    return await self.close(TOO_SLOW)
        except Exception:  # the socket outlives what goes wrong with one answer
            logger.exception("message %s: could not be followed", message_id)
        finally:
            if self.followed.get(message_id) is asyncio.current_task():
                del self.followed[message_id]
            await frames.aclose()

    async def send_frame(self, frame: dict) -> None:
        text = json.dumps(frame, ensure_ascii=False, separators=(",", ":"))
        if frame.get("seq") is not None:
            size = len(text.encode(errors="replace"))
            self.unacknowledged.append((frame["message"], frame["seq"], size))
            self.window += size
            self.acknowledgeable += 1
        with contextlib.suppress(OSError):  # the client has left; `disconnect` is on its way
            await self.send(text_data=text)
