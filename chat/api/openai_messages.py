"""The `messages` of OpenAI's API as turns of the roles that chat templates know."""

import json
import uuid
from typing import Any

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from portal.text import check_content, is_storable

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def turns_of(messages, refuse, param: str = "messages") -> list[dict]:
    """The turns of a chat.engine.request.Request, the last one the user's or a tool's;
    `refuse(param, message, code?)` is called for every problem.
    """
    if not isinstance(messages, list) or not messages:
        refuse(param, _("Send at least one message."), "missing_required_parameter")
        return []
    found: list[dict] = []
    for i, message in enumerate(messages):
        place = f"{param}[{i}]"
        if not isinstance(message, dict):
            refuse(place, _("Must be an object."))
            continue
        spelt = message.get("role")
        role = ROLES.get(spelt) if isinstance(spelt, str) else None
        if role is None:
            refuse(f"{place}.role", _("The roles are system, developer, user, assistant and tool."))
        content = text_of(message.get("content"), f"{place}.content", refuse, spelt == "assistant")
        turn: dict[str, Any] = {"role": role or "user", "content": content}
        if role == "assistant" and (calls := _calls(message)):
            turn["tool_calls"] = calls
        if role == "tool":
            told = {name: message.get(name) for name in ("tool_call_id", "name")}
            turn |= {name: str(text) for name, text in told.items() if _is_text(text)}
        if role != "system" or content.strip():  # clients send an empty one for none
            found.append(turn)
    if found and found[-1]["role"] == "system":  # a client that knows one box for text
        found[-1]["role"] = "user"
    if found and found[-1]["role"] == "assistant":
        refuse(param, _("The last message must be the user's."))
    return found


def text_of(content, place: str, refuse, may_be_absent: bool = False) -> str:
    """Of a text or a list of parts, which are paragraphs."""
    if content is None and may_be_absent:
        return ""
    if isinstance(content, list):
        texts = [_text_of_part(part) for part in content]
        if None in texts or not (texts or may_be_absent):
            refuse(
                place, _("Only parts of the type “text” are possible here."), "unsupported_content"
            )
            return ""
        content = "\n\n".join(text for text in texts if text)
    try:
        return check_content(content)
    except ValidationError as error:
        refuse(place, error.message, "invalid_value" if error.code == "invalid" else error.code)
        return ""


def _text_of_part(part) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS:
        return None
    text = part.get("text", part.get("refusal"))
    return text if isinstance(text, str) else None


def _calls(message: dict) -> list[dict]:
    """An assistant's calls of tools, in OpenAI's form with all of its fields."""
    calls = message.get("tool_calls") or []
    if isinstance(message.get("function_call"), dict):
        calls = [{"function": message["function_call"]}]
    found = []
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            continue
        id, name, arguments = call.get("id"), function.get("name"), function.get("arguments")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments or {}, ensure_ascii=False)
        if _is_text(name) and is_storable(arguments):
            called = {"name": name, "arguments": arguments}
            id = id if _is_text(id) else new_call_id()
            found.append({"id": id, "type": "function", "function": called})
    return found


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value) and is_storable(value)


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
