"""Server-sent events: frames of an async iterator as a response that stays alive while nothing
happens.
"""

import asyncio
import json
from collections.abc import AsyncGenerator

from django.http import StreamingHttpResponse

from portal.logins import Login, ended

# seconds of silence after which a comment tells proxies and us that the reader is still there
KEEPALIVE = 15.0


async def kept_alive(chunks: AsyncGenerator[str, None], login: Login) -> AsyncGenerator[str, None]:
    """`chunks`, with a comment whenever none comes for KEEPALIVE seconds; closes `chunks` when the
    reader leaves or the login that asked for them is over.
    """
    waiting = None
    over = asyncio.ensure_future(ended(login))
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(chunks))
            done, _pending = await asyncio.wait(
                {waiting, over}, timeout=KEEPALIVE, return_when=asyncio.FIRST_COMPLETED
            )
            if over in done:
                return
            if not done:
                yield ": still here\n\n"
                continue
            finished, waiting = waiting, None
            try:
                yield finished.result()
            except StopAsyncIteration:
                return
    finally:
        over.cancel()
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await chunks.aclose()


def comment(text: str) -> str:
    """What clients skip, and people who read along see."""
    return f": {text}\n\n"


def loading(event) -> str:
    """How far the model is that an answer waits for."""
    told = event.data
    name, usual = told.get("checkpoint", ""), told.get("usual_seconds")
    usually = f" of about {usual:.0f}" if usual else ""
    return comment(f"{told['phase']} {name} {told['seconds']}{usually} s")


def data(payload) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


def response(chunks: AsyncGenerator[str, None], login: Login) -> StreamingHttpResponse:
    streamed = StreamingHttpResponse(
        kept_alive(chunks, login), content_type="text/event-stream; charset=utf-8"
    )
    streamed["Cache-Control"] = "no-store"
    streamed["X-Accel-Buffering"] = "no"
    return streamed
