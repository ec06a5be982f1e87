"""What a Response is made of: one item of thoughts, one of text, one for each call of a function,
in the order in which they are written; and the events that tell of them as they come.
"""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

from chat.api.openai_tools import Answer, Offered

PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
# of a piece of an answer -> (type of its item, of its part, of its deltas)
KINDS = {
    "thought": ("reasoning", "reasoning_text", "response.reasoning_text"),
    "text": ("message", "output_text", "response.output_text"),
    "call": ("function_call", "", "response.function_call_arguments"),
}

Event = tuple[str, dict]  # its type, and its fields but the sequence number


@dataclass
class Item:
    """written: the text, or a call's arguments."""

    kind: str  # of KINDS
    index: int
    call_id: str = ""
    name: str = ""
    written: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.type, self.part_type, self.deltas = KINDS[self.kind]
        self.id = f"{PREFIXES[self.type]}_{self.id}"

    def part(self) -> dict:
        part: dict = {"type": self.part_type, "text": self.written}
        return {**part, "annotations": [], "logprobs": []} if self.kind == "text" else part

    def told(self, status: str, empty: bool = False) -> dict:
        found: dict = {"type": self.type, "id": self.id, "status": status}
        if self.kind == "call":
            return {
                **found,
                "call_id": self.call_id,
                "name": self.name,
                "arguments": self.written,
            }
        content = [] if empty else [self.part()]
        return {**found, **self._head(), "content": content}

    def _head(self) -> dict:
        return {"role": "assistant"} if self.kind == "text" else {"summary": []}

    def _logprobs(self) -> dict:
        return {"logprobs": []} if self.kind == "text" else {}

    def place(self) -> dict:
        found = {"item_id": self.id, "output_index": self.index}
        return found if self.kind == "call" else {**found, "content_index": 0}

    def opening(self) -> Iterator[Event]:
        told = self.told("in_progress", empty=True)
        yield "response.output_item.added", {"output_index": self.index, "item": told}
        if self.part_type:
            yield "response.content_part.added", {**self.place(), "part": self.part()}

    def more(self, text: str) -> Event:
        self.written += text
        return f"{self.deltas}.delta", {**self.place(), "delta": text, **self._logprobs()}

    def ending(self, status: str) -> Iterator[Event]:
        if self.kind == "call":
            done = {**self.place(), "name": self.name, "arguments": self.written}
            yield f"{self.deltas}.done", done
        else:
            done = {**self.place(), "text": self.written, **self._logprobs()}
            yield f"{self.deltas}.done", done
            yield "response.content_part.done", {**self.place(), "part": self.part()}
        told = self.told(status)
        yield "response.output_item.done", {"output_index": self.index, "item": told}


class Items:
    """An answer's, as it comes: feed(text), then end(status), give the events."""

    def __init__(self, offered: Offered):
        self._answer = Answer(offered)
        self._items: list[Item] = []

    def feed(self, text: str) -> Iterator[Event]:
        for piece in self._answer.feed(text):
            yield from self._take(piece)

    def end(self, status: str) -> Iterator[Event]:
        for piece in self._answer.flush():
            yield from self._take(piece)
        if not self._items:
            yield from self._open(Item("text", 0))
        yield from self._items[-1].ending(status)

    def output(self, status: str) -> list[dict]:
        """status: of the last one; whatever has another behind it is complete."""
        *before, last = self._items
        return [*(item.told("completed") for item in before), last.told(status)]

    def _take(self, piece: tuple) -> Iterator[Event]:
        kind, *told = piece
        if kind == "call":
            call = self._answer.calls[told[0]]
            item = Item("call", len(self._items), call_id=call.id, name=call.name)
            yield from self._open(item)
        elif kind == "arguments":
            yield self._items[-1].more(told[1])
        else:
            if not self._items or self._items[-1].kind != kind:
                yield from self._open(Item(kind, len(self._items)))
            yield self._items[-1].more(told[0])

    def _open(self, item: Item) -> Iterator[Event]:
        if self._items:
            yield from self._items[-1].ending("completed")
        self._items.append(item)
        yield from item.opening()


def as_messages(items) -> object:
    """A Response's `input` as messages of the chat interface."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list):
        return items
    found: list = []
    for item in items:
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "function_call":
            call = {"id": item.get("call_id"), "function": item}
            last = found[-1] if found else None
            if isinstance(last, dict) and last.get("role") == "assistant":  # of the same turn
                found[-1] = {**last, "tool_calls": [*last.get("tool_calls", []), call]}
            else:
                found.append({"role": "assistant", "tool_calls": [call]})
        elif kind == "function_call_output":
            result = item.get("output")
            result = result if isinstance(result, (str, list)) else json.dumps(result)
            found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": result})
        elif kind != "reasoning":
            found.append(item)
    return found
