"""The `messages` of OpenAI's API as turns of the roles that chat templates know."""

import json

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from portal.text import check_content, is_storable

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "user",
    "function": "user",
}
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def turns_of(messages, refuse, param: str = "messages") -> list[dict[str, str]]:
    """[{"role": "system" | "user" | "assistant", "content"}], the last one the user's;
    `refuse(param, message, code?)` is called for every problem.

    Calls of tools and their results are told in words, since most templates know neither: the call
    as the assistant's text, the results as one message of the user's.
    """
    if not isinstance(messages, list) or not messages:
        refuse(param, _("Send at least one message."), "missing_required_parameter")
        return []
    found: list[dict[str, str]] = []
    names: dict[str, str] = {}  # of the tools, by the id of the call
    after_result = False
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
        if spelt == "assistant":
            content = "\n".join(part for part in (content, _calls(message, names)) if part)
        is_result = spelt in ("tool", "function")
        if is_result:
            name = message.get("name") or names.get(str(message.get("tool_call_id")), "")
            content = f"{name}: {content}" if name else content
        if is_result and after_result:
            found[-1]["content"] += f"\n\n{content}"
        elif role != "system" or content.strip():  # clients send an empty one for none
            found.append({"role": role or "user", "content": content})
        after_result = is_result
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


def _calls(message: dict, names: dict[str, str]) -> str:
    """An assistant's calls of tools, a line each; their names go into `names`."""
    calls = message.get("tool_calls") or []
    if isinstance(message.get("function_call"), dict):
        calls = [{"function": message["function_call"]}]
    lines = []
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            continue
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        line = f"{name}({arguments})"
        if is_storable(line):
            names[str(call.get("id"))] = str(name)
            lines.append(line)
    return "\n".join(lines)
