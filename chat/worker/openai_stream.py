"""The stream of an OpenAI-compatible server, read forgivingly: what it wrote is kept, and an answer
ends where the server says so in any way. No torch, no Django.

Why not the official client: docs/adr/0014-own-reader-for-remote-streams.md.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

LONGEST_LINE = 64 << 20  # bytes
# everything else that others invent counts as "stop"
FINISHED = {"stop": "stop", "length": "length", "max_tokens": "length"}
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


@dataclass
class Reading:
    """What a stream has said so far. finish_reason: None while it has not ended."""

    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    _thinking: bool = False
    _call: int | None = None  # the number of the call that is being written
    _given: bool = False  # whether it has arguments so far

    def take(self, chunk: Any) -> list[dict[str, Any]]:
        """The data of the `delta` events that a chunk says. ValueError: it reports an error."""
        if isinstance(chunk, list):  # some proxies batch
            return [delta for each in chunk for delta in self.take(each)]
        if not isinstance(chunk, dict):
            return []
        if chunk.get("error"):
            raise ValueError(message_of(chunk) or "the server reported an error")
        self._count(chunk.get("usage"))
        found = []
        for choice in chunk.get("choices") or ():
            if isinstance(choice, dict):
                if choice.get("finish_reason"):
                    self.finish_reason = FINISHED.get(str(choice["finish_reason"]), "stop")
                found.append(self.delta(choice))
        return [delta for delta in found if delta is not None]

    def end(self) -> dict[str, Any] | None:
        """The stream's own end ([DONE]): a reason that was never given is "stop"."""
        self.finish_reason = self.finish_reason or "stop"
        return self._text_delta("", {})

    def delta(self, choice: dict[str, Any]) -> dict[str, Any] | None:
        """What a choice says, as the data of a `delta` event; None: nothing."""
        # servers that do not stream answer with the whole message
        said = choice.get("delta") or choice.get("message") or {}
        said = said if isinstance(said, dict) else {"content": said}
        thought = text_of(said.get("reasoning_content") or said.get("reasoning"))
        text = text_of(said.get("content") or choice.get("text"))
        text += self._calls(said.get("tool_calls"))
        if thought:
            thought, self._thinking = ("" if self._thinking else "<think>\n") + thought, True
        return self._text_delta(text, choice, thought)

    def _calls(self, calls: Any) -> str:
        """As models write them (chat/engine/tool_calls.py)."""
        text = ""
        for i, call in enumerate(calls if isinstance(calls, list) else ()):
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict):
                continue
            number, name = call.get("index", i), function.get("name")
            if name and number != self._call:
                text += self._call_end()
                text += f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": '
                self._call, self._given = number, False
            given = function.get("arguments") or ""
            given = given if isinstance(given, str) else json.dumps(given)
            text, self._given = text + given, self._given or bool(given)
        return text

    def _call_end(self) -> str:
        if self._call is None:
            return ""
        self._call = None
        return ("" if self._given else "{}") + "}\n</tool_call>\n"

    def _text_delta(
        self, text: str, choice: dict[str, Any], thought: str = ""
    ) -> dict[str, Any] | None:
        if self._thinking and (text or self.finish_reason):
            thought, self._thinking = thought + "\n</think>\n\n", False
        if self.finish_reason:
            text += self._call_end()
        if not thought + text:
            return None
        logprobs = choice.get("logprobs")
        entries = logprobs.get("content") if isinstance(logprobs, dict) else None
        return {"text": thought + text, "tokens": 1} | ({"logprobs": entries} if entries else {})

    def _count(self, usage: Any) -> None:
        if isinstance(usage, dict):
            told = {name: usage.get(name) for name in COUNTS}
            self.usage |= {name: n for name, n in told.items() if isinstance(n, int)}


def response_format(schema: str | None) -> dict[str, Any] | None:
    """A JSON schema, as text, in OpenAI's words."""
    if schema is None:
        return None
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": json.loads(schema)},
    }


def text_of(content: Any) -> str:
    """Of a text, or a list of parts."""
    if isinstance(content, list):
        return "".join(
            text_of(part.get("text") if isinstance(part, dict) else part) for part in content
        )
    return content if isinstance(content, str) else ""


async def payloads(content: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    """The JSON values of a server-sent event stream, and None at its own end ([DONE]). `content`:
    the body in pieces of any size. ValueError for what is no JSON.
    """
    async for line in _lines(content):
        if not line.startswith(b"data:"):
            continue
        payload = line[5:].strip()
        if payload == b"[DONE]":
            yield None
            return
        if payload:
            yield json.loads(payload)


async def _lines(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """However long: aiohttp's own lines end at 128 KiB."""
    held = bytearray()
    async for piece in content:
        held += piece
        if len(held) > LONGEST_LINE:
            raise ValueError("a line of its stream is too long")
        if b"\n" in piece:
            *lines, rest = held.split(b"\n")
            held = bytearray(rest)
            for line in lines:
                yield bytes(line).rstrip(b"\r")
    if held:
        yield bytes(held)


def message_of(body: Any) -> str:
    """The message of an error body, whichever of the usual forms it has."""
    if not isinstance(body, dict):
        return ""
    error = body.get("error", body)
    if isinstance(error, dict):
        return str(error.get("message") or error.get("detail") or "")
    return str(error)
