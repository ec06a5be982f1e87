"""The body of POST /v1/chat/completions as what the engine takes, with every problem at once. No
Django request in here.
"""

from dataclasses import dataclass

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from chat.engine.request import MOST_STOPS
from chat.sampling import number_problem
from chat.text import check_length, is_storable

MOST_CHOICES = 16
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# OpenAI's name (or vLLM's, for what OpenAI lacks) -> ours
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}
# Parameters that would change the answer and that the engine does not have; their neutral values
# are accepted.
NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}


@dataclass(frozen=True)
class ChatRequest:
    model: str
    messages: list[dict[str, str]]
    samplings: list[dict]  # one per choice: fields of chat.engine.request.Sampling
    stream: bool
    include_usage: bool


def chat_request(body) -> ChatRequest:
    """ValidationError({param: ...}) naming every problem of the body."""
    if not isinstance(body, dict):
        raise ValidationError(
            {"__all__": ValidationError(_("The body must be a JSON object."), "invalid_json")}
        )
    problems: dict[str, ValidationError] = {}

    def refuse(param: str, message: str, code: str = "invalid_value") -> None:
        problems.setdefault(param, ValidationError(message, code))

    def flag(container: dict, param: str) -> bool:
        value = container.get(param.rpartition(".")[2])
        if value is not None and not isinstance(value, bool):
            refuse(param, _("Must be true or false."))
        return value is True

    model = body.get("model")
    if not isinstance(model, str) or not model:
        refuse("model", _("Name a model; GET /v1/models lists them."), "missing_required_parameter")
    messages = _messages(body.get("messages"), refuse)
    values = {}
    for theirs, ours in SAMPLING.items():
        value = body.get(theirs)
        if value is None:
            continue
        if theirs == "top_k" and value == -1:  # vLLM's way to say off
            value = 0
        problem = number_problem(ours, value)
        if problem:
            refuse(theirs, problem)
        else:
            values[ours] = value
    seed = body.get("seed")
    if seed is not None and (
        not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63
    ):
        refuse("seed", _("Must be a whole number."))
        seed = None
    count = body.get("n", 1) if body.get("n") is not None else 1
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_CHOICES:
        refuse(
            "n", _("Must be between %(least)s and %(most)s.") % {"least": 1, "most": MOST_CHOICES}
        )
        count = 1
    for param, neutral in NEUTRAL.items():
        value = body.get(param)
        if value is not None and value not in neutral:
            refuse(param, _("This parameter is not supported here."), "unsupported_parameter")
    stops = _stops(body.get("stop"), refuse)
    logprobs = _logprobs(body, flag, refuse)
    stream = flag(body, "stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        refuse("stream_options", _("Must be an object."))
    include_usage = (
        flag(options, "stream_options.include_usage") if isinstance(options, dict) else False
    )
    if problems:
        raise ValidationError(problems)
    # n choices of one seed would be n times the same answer
    samplings = [
        {
            **values,
            "stop": stops,
            "logprobs": logprobs,
            "seed": None if seed is None else (seed + i) % 2**63,
        }
        for i in range(count)
    ]
    return ChatRequest(model, messages, samplings, stream, include_usage)


def _messages(messages, refuse) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        refuse("messages", _("Send at least one message."), "missing_required_parameter")
        return []
    found = []
    for i, message in enumerate(messages):
        param = f"messages[{i}]"
        if not isinstance(message, dict):
            refuse(param, _("Must be an object."))
            continue
        role = ROLES.get(message.get("role")) if isinstance(message.get("role"), str) else None
        if role is None:
            refuse(f"{param}.role", _("The roles are system, developer, user and assistant."))
        content = _content(message.get("content"), f"{param}.content", role, refuse)
        if role != "system" or content.strip():  # clients send an empty one for none
            found.append({"role": role, "content": content})
    if found and found[-1]["role"] in ("system", "assistant"):
        refuse("messages", _("The last message must be the user's."))
    return found


def _content(content, param: str, role: str | None, refuse) -> str:
    if content is None and role == "assistant":
        return ""
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        if not texts or not all(isinstance(text, str) for text in texts):
            refuse(
                param, _("Only parts of the type “text” are possible here."), "unsupported_content"
            )
            return ""
        content = "".join(texts)
    if not isinstance(content, str):
        refuse(param, _("Must be a text."))
        return ""
    if not is_storable(content):
        refuse(param, _("The text contains a NUL or half a character."))
    try:
        check_length(content)
    except ValidationError as error:
        refuse(param, error.message, error.code)
    return content


def _stops(stop, refuse) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(text, str) and text and is_storable(text) for text in stops)
    ):
        refuse(
            "stop",
            _("Must be a text or a list of up to %(most)s texts, none empty.")
            % {"most": MOST_STOPS},
        )
        return ()
    return tuple(stops)


def _logprobs(body: dict, flag, refuse) -> int | None:
    wanted, top = flag(body, "logprobs"), body.get("top_logprobs")
    if top is not None:
        problem = number_problem("logprobs", top)
        if problem or not wanted:
            refuse("top_logprobs", problem or _("Needs logprobs to be true."))
            return None
    return (top or 0) if wanted else None
