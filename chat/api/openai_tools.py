"""`tools` of OpenAI's API and its older `functions`: what a body offers, and calls in the words of
an answer. Which templates know tools, and how their models call them: chat/engine/tools.py.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from django.utils.translation import gettext as _

from chat.api.openai_messages import new_call_id
from chat.engine.thoughts import Thoughts
from chat.engine.tool_calls import Piece, ToolCalls
from portal.text import is_storable

if TYPE_CHECKING:
    from chat.api.openai_request import Body

MOST_TOOLS = 128  # as many as OpenAI's API takes
LONGEST = 200_000  # characters of JSON
NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
FIELDS = ("tools", "functions", "tool_choice", "function_call", "parallel_tool_calls")


@dataclass(frozen=True)
class Offered:
    """tools, must_call: of chat.engine.request.Request. several: whether one answer may call more
    than once. older: asked for, and answered, in the words of `functions`.
    """

    tools: tuple[dict, ...] = ()
    must_call: tuple[str, ...] = ()
    several: bool = True
    older: bool = False


NO_TOOLS = Offered()


def offered(body: "Body") -> Offered:
    """Takes its fields out of the body."""
    if "none" in (body.get("tool_choice"), body.get("function_call")):
        body.fields = {name: value for name, value in body.fields.items() if name not in FIELDS}
        return NO_TOOLS
    older = bool(body.get("functions")) and not body.get("tools")
    param, choice = ("functions", "function_call") if older else ("tools", "tool_choice")
    tools, wanted = _tools(body, param), body.get(choice)
    single = body.get("parallel_tool_calls") is not None and not body.flag("parallel_tool_calls")
    names = [tool["function"]["name"] for tool in tools]
    must_call: tuple[str, ...] = ()
    if wanted in ("required", "any"):  # Mistral's word
        must_call = tuple(names)
    elif isinstance(wanted, dict):
        must_call = (_named(wanted),)
    elif wanted not in (None, "auto"):
        must_call = ("",)
    if (must_call and not set(must_call) <= set(names)) or (wanted == "required" and not names):
        message = _("Must be auto, none, required, or name one of the tools that are sent.")
        body.refuse(choice, message)
    body.fields = {name: value for name, value in body.fields.items() if name not in FIELDS}
    return Offered(tuple(tools), must_call, not single, older)


def _tools(body: "Body", param: str) -> list[dict]:
    """In the form of `tools`, whichever of OpenAI's three they were sent in."""
    sent = body.get(param) or []
    if not isinstance(sent, list) or len(sent) > MOST_TOOLS:
        body.refuse(param, _("Must be a list of up to %(most)s tools.") % {"most": MOST_TOOLS})
        return []
    found = []
    for i, tool in enumerate(sent):
        place = f"{param}[{i}]"
        kind = tool.get("type", "function") if isinstance(tool, dict) else None
        if kind != "function":
            message = _("Only tools of the type “function” are possible here.")
            body.refuse(f"{place}.type", message, "unsupported_parameter")
            continue
        function = tool.get("function", tool)
        function = function if isinstance(function, dict) else {}
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            message = _("Needs a name of up to 64 letters, digits, “_”, “-” and “.”.")
            body.refuse(f"{place}.name", message)
        elif not isinstance(parameters or {}, dict):
            body.refuse(f"{place}.parameters", _("Must be an object."))
        else:
            told = {"name": name, "description": function.get("description") or ""}
            told["parameters"] = parameters or {"type": "object", "properties": {}}
            found.append({"type": "function", "function": told})
    text = json.dumps(found, ensure_ascii=False)
    if len(text) > LONGEST or not is_storable(text):
        body.refuse(param, _("Must have at most %(most)s characters.") % {"most": f"{LONGEST:,}"})
    return found


def _named(choice: dict) -> str:
    """{"type": "function", "function": {"name"}}, or flat as elsewhere; "" where it names none."""
    name = choice.get("function", choice)
    name = name.get("name") if isinstance(name, dict) else None
    return name if isinstance(name, str) else ""


@dataclass
class Call:
    name: str
    id: str = field(default_factory=new_call_id)
    arguments: str = ""


class Answer:
    """One answer as it comes, taken apart: feed(text) and flush() give pieces, ("thought" | "text",
    text) or ("call" | "arguments", index, text). What is whole stands in `thought`, `text` and
    `calls`.
    """

    def __init__(self, wanted: Offered = NO_TOOLS):
        self.thought, self.text = "", ""
        self.calls: list[Call] = []
        self._wanted, self._thoughts = wanted, Thoughts()
        functions = [tool["function"] for tool in wanted.tools]
        self._tools = ToolCalls({each["name"]: each["parameters"] for each in functions})

    def feed(self, text: str) -> Iterator[tuple]:
        yield from self._told(*self._thoughts.feed(text), final=False)

    def flush(self) -> Iterator[tuple]:
        yield from self._told(*self._thoughts.flush(), final=True)

    def whole(self, text: str) -> "Answer":
        for _piece in (*self.feed(text), *self.flush()):
            pass
        return self

    def finish_reason(self, reason: str | None) -> str | None:
        if reason != "stop" or not self.calls:
            return reason
        return "function_call" if self._wanted.older else "tool_calls"

    def _told(self, thought: str, text: str, final: bool) -> Iterator[tuple]:
        if thought:
            self.thought += thought
            yield "thought", thought
        if self._wanted.tools:
            pieces = self._tools.feed(text, final)
        else:
            pieces = [Piece(text)] if text else []
        for piece in pieces:
            if piece.text:
                self.text += piece.text
                yield "text", piece.text
            elif piece.index and not (self._wanted.several and not self._wanted.older):
                continue  # one call was asked for
            elif piece.name:
                self.calls.append(Call(piece.name))
                yield "call", piece.index, piece.name
            else:
                self.calls[piece.index].arguments += piece.arguments
                yield "arguments", piece.index, piece.arguments

    # -- in the words of /v1/chat/completions

    def delta(self, piece: tuple) -> dict:
        """Thoughts go under the name that vLLM and DeepSeek gave them."""
        kind, *told = piece
        if kind == "thought":
            return {"reasoning_content": told[0]}
        if kind == "text":
            return {"content": told[0]}
        index, text = told
        call = self.calls[index]
        function = {"name": call.name, "arguments": ""} if kind == "call" else {"arguments": text}
        if self._wanted.older:
            return {"function_call": function}
        head = {"id": call.id, "type": "function"} if kind == "call" else {}
        return {"tool_calls": [{"index": index, **head, "function": function}]}

    def message(self) -> dict:
        functions = [{"name": call.name, "arguments": call.arguments} for call in self.calls]
        content = self.text if self.text or not functions else None
        message: dict = {"role": "assistant", "content": content, "refusal": None}
        if self.thought:
            message["reasoning_content"] = self.thought
        if functions and self._wanted.older:
            message["function_call"] = functions[0]
        elif functions:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": function}
                for call, function in zip(self.calls, functions, strict=True)
            ]
        return message
