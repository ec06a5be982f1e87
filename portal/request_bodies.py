"""Bodies of requests, before any view: how large, how slow, from whom; and the length of those that
came in chunks.
"""

import contextlib
import io
from asyncio import get_running_loop, timeout_at
from collections import Counter

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.http import HttpRequest, parse_cookie
from django.utils import translation
from django.utils.translation import gettext_lazy as _

from portal.rest.api_keys import user_of_scope
from portal.rest.conventions import json_error

MOST_BYTES = 6 * 1024 * 1024  # above DATA_UPLOAD_MAX_MEMORY_SIZE, whose refusal says more
FORM_ROOM = 1024 * 1024  # of an upload beside its file
MOST_UPLOADS = 2  # large bodies of one member at once
PATIENCE, SLOWEST = 60.0, 4096  # a body may take 60 s, and a second more for every 4 KB that came


class Handler(ASGIHandler):
    """Django's, for which a body without Content-Length is none: DRF and forms read nothing."""

    def create_request(self, scope, body_file):
        length = body_file.seek(0, io.SEEK_END)
        body_file.seek(0)
        others = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        if length or len(others) < len(scope["headers"]):
            scope = {**scope, "headers": [*others, (b"content-length", b"%d" % length)]}
        return super().create_request(scope, body_file)


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str):
        self.status, self.code, self.message = status, code, message


class LimitedBodies:
    """ASGI middleware. Refuses a body by its declared length before it is read, or once more than
    allowed has come, with 413; one that trickles with 408; an upload of nobody's with 401, of
    somebody who is uploading already with 429.

    `upload_paths` take files of up to DATASET_MAX_BYTES; everything else takes MOST_BYTES.
    """

    def __init__(self, application, upload_paths: set[str]):
        self.application, self.upload_paths = application, upload_paths
        self.uploading: Counter[int] = Counter()  # by member

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.application(scope, receive, send)
        started = complete = False
        received, begun = 0, get_running_loop().time()
        admitted = contextlib.ExitStack()

        async def limited_receive():
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                async with timeout_at(begun + PATIENCE + received / SLOWEST):
                    message = await receive()
            except TimeoutError:
                raise Refused(408, "too_slow", _("The body did not arrive in time.")) from None
            received += len(message.get("body", b""))
            await self._admit(scope, received, admitted)
            complete = not message.get("more_body", False)
            return message

        async def watched_send(message):
            nonlocal started
            started = True
            await send(message)

        with admitted:
            try:
                await self._admit(scope, _declared(scope), admitted)
                await self.application(scope, limited_receive, watched_send)
            except Refused as refusal:
                if not started:
                    await _answer(refusal, scope, send)

    async def _admit(self, scope, size: int, admitted: contextlib.ExitStack) -> None:
        """Refused when the body may not be `size` bytes long; a large one is counted until
        `admitted` closes."""
        if size <= MOST_BYTES:
            return
        if scope["path"] not in self.upload_paths or size > settings.DATASET_MAX_BYTES + FORM_ROOM:
            raise Refused(413, "too_large", _("The body is too large."))
        if "portal.uploader" in scope:
            return
        user = await sync_to_async(user_of_scope)(scope)
        if user is None:
            raise Refused(401, "not_authenticated", _("Log in, or send a key of yours, to upload."))
        if self.uploading[user.pk] >= MOST_UPLOADS:
            raise Refused(
                429, "too_many_uploads", _("You are uploading already; wait until that has ended.")
            )
        scope["portal.uploader"] = user.pk
        self.uploading[user.pk] += 1
        admitted.callback(self._ended, user.pk)

    def _ended(self, member: int) -> None:
        self.uploading[member] -= 1
        if not self.uploading[member]:
            del self.uploading[member]


def _declared(scope) -> int:
    """Content-Length, which the server has found to be a number; 0 where there is none."""
    return int(dict(scope["headers"]).get(b"content-length", 0))


async def _answer(refusal: Refused, scope, send) -> None:
    asked = dict(scope["headers"])
    request = HttpRequest()
    request.META["HTTP_ACCEPT_LANGUAGE"] = asked.get(b"accept-language", b"").decode("latin-1")
    request.COOKIES = parse_cookie(asked.get(b"cookie", b"").decode("latin-1"))
    with translation.override(translation.get_language_from_request(request)):
        response = json_error(refusal.status, str(refusal.message), code=refusal.code)
    headers = [(name.lower().encode(), value.encode()) for name, value in response.items()]
    headers.append((b"content-length", b"%d" % len(response.content)))
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": response.content})
