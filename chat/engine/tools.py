"""Functions that a model may call ("tools"): what its template makes of them, and the shape of an
answer that must call one. Calls in an answer are found by chat/engine/tool_calls.py.

Requests carry `tools` and the calls of earlier turns in OpenAI's own form. No torch, no Django.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

TOOL_CALL = "<tool_call>"  # before a call of Hermes, Qwen and many since
_KNOWS = re.compile(r"\btools\b")
_OTHER_CALLS = ("<function=", "<arg_key>")  # Qwen3-Coder's and GLM-4.5's, which are no JSON
NO_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}

Turn = dict[str, Any]


@dataclass(frozen=True)
class ToolForm:
    """How the models of a chat template write a call: {"name": ..., `key`: {...}}.

    opening: what stands before it, where that is no control token.
    """

    key: str = "arguments"
    opening: str = ""

    @classmethod
    def of(cls, template: Any) -> ToolForm | None:
        """Of a chat template (or several, by name); None: it has no place for tools."""
        text = template if isinstance(template, str) else json.dumps(template or "")
        if not _KNOWS.search(text):
            return None
        if TOOL_CALL in text:
            json_inside = not any(other in text for other in _OTHER_CALLS)
            return cls(opening="<tool_call>\n" if json_inside else "")
        llama = '"parameters": ' in text.replace("\\", "")  # its name for what a call gives
        return cls(key="parameters" if llama else "arguments")

    def schema(
        self, tools: Sequence[dict[str, Any]], must_call: Sequence[str], answer: str | None
    ) -> str | None:
        """The JSON schema of an answer that calls one of `must_call`; where there are none but
        `answer`, of one that satisfies that or calls any of `tools`; None: it is free.
        """
        if not must_call and answer is None:
            return None
        defined: dict[str, Any] = {}
        choices: list[dict[str, Any]] = []
        if not must_call:
            defined["answer"] = _moved(json.loads(answer or "{}"), "#/$defs/answer")
            choices.append({"$ref": "#/$defs/answer"})
        for number, tool in enumerate(tools):
            function = tool["function"]
            if must_call and function["name"] not in must_call:
                continue
            place = f"function{number}"
            parameters = function.get("parameters") or NO_PARAMETERS
            defined[place] = _moved(parameters, f"#/$defs/{place}")
            choices.append(
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": function["name"]},
                        self.key: {"$ref": f"#/$defs/{place}"},
                    },
                    "required": ["name", self.key],
                    "additionalProperties": False,
                }
            )
        shape = choices[0] if len(choices) == 1 else {"anyOf": choices}
        return json.dumps({**shape, "$defs": defined})


def _moved(schema: Any, to: str) -> Any:
    """A JSON schema that stands at `to` in another: what it says of itself still leads there."""
    if isinstance(schema, list):
        return [_moved(part, to) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _moved(value, to) for key, value in schema.items() if key != "$id"}
    reference = found.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        found["$ref"] = to + reference[1:]
    return found


def has_tool_turns(messages: Iterable[Turn]) -> bool:
    return any(turn["role"] == "tool" or turn.get("tool_calls") for turn in messages)


def for_template(messages: Iterable[Turn]) -> list[Turn]:
    """As chat templates expect them: arguments as objects, ids of nine characters (Mistral's
    insists on that), each result with the name of what was called.
    """
    found, names = [], {}
    for turn in messages:
        turn = dict(turn)
        if turn.get("tool_calls"):
            calls = []
            for call in turn["tool_calls"]:
                function = call["function"]
                names[call["id"]] = function["name"]
                shown = {"name": function["name"], "arguments": _parsed(function["arguments"])}
                calls.append({"id": _short(call["id"]), "type": "function", "function": shown})
            turn["tool_calls"] = calls
        elif turn["role"] == "tool":
            called = turn.get("tool_call_id") or ""
            turn["name"] = turn.get("name") or names.get(called, "")
            turn["tool_call_id"] = _short(called)
        found.append(turn)
    return found


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:  # whatever a model wrote; it is shown again
        return arguments


def _short(id: str) -> str:
    return hashlib.sha256(id.encode()).hexdigest()[:9]


def in_words(messages: Iterable[Turn]) -> list[dict[str, str]]:
    """For templates that know no tools: a call as the assistant's text, the results that follow it
    as one message of the user's.
    """
    found: list[dict[str, str]] = []
    names: dict[str, str] = {}
    after_result = False
    for turn in messages:
        role, content = turn["role"], turn["content"]
        lines = [content] if content else []
        for call in turn.get("tool_calls") or ():
            function = call["function"]
            names[call["id"]] = function["name"]
            lines.append(f"{function['name']}({function['arguments']})")
        if role == "tool":
            name = turn.get("name") or names.get(turn.get("tool_call_id") or "", "")
            content = f"{name}: {content}" if name else content
            if after_result:
                found[-1]["content"] += f"\n\n{content}"
            else:
                found.append({"role": "user", "content": content})
        else:
            found.append({"role": role, "content": "\n".join(lines)})
        after_result = role == "tool"
    return found
