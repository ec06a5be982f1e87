"""The bodies of OpenAI's API as what the engine takes, with every problem at once. No Django
request in here.
"""

import json
from dataclasses import dataclass, field

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from chat.api.openai_messages import turns_of
from chat.api.openai_tools import Offered, offered
from chat.conversations.messages import without_history
from chat.engine.request import LIMITS, MOST_BIASES, MOST_STOPS
from chat.sampling import as_whole, number_problem
from portal.text import is_storable

MOST_CHOICES = 16
LONGEST_SCHEMA = 50_000  # characters
# OpenAI's name (or vLLM's, or ours, for what OpenAI lacks) -> ours
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "prefix_strength": "prefix_strength",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_output_tokens": "max_new_tokens",
}
# Parameters that would change the answer and that are not done here; their neutral values (and null
# or nothing in them) are accepted.
NEUTRAL = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
}


@dataclass(frozen=True)
class ChatRequest:
    model: str
    messages: list[dict]  # turns of a chat.engine.request.Request
    samplings: list[dict]  # one per choice: fields of chat.engine.request.SamplingParams
    stream: bool
    include_usage: bool
    offered: Offered  # the tools


@dataclass
class Body:
    """A body while it is read. problems: what is wrong with it, by parameter."""

    fields: dict
    problems: dict[str, ValidationError] = field(default_factory=dict)

    @classmethod
    def of(cls, body) -> "Body":
        if not isinstance(body, dict):
            raise ValidationError(
                {"__all__": ValidationError(_("The body must be a JSON object."), "invalid_json")}
            )
        return cls(body)

    def get(self, param: str):
        return self.fields.get(param)

    def refuse(self, param: str, message: str, code: str = "invalid_value") -> None:
        self.problems.setdefault(param, ValidationError(message, code))

    def unsupported(self, param: str) -> None:
        self.refuse(param, _("This parameter is not supported here."), "unsupported_parameter")

    def check(self) -> None:
        """ValidationError({param: ...}) with every problem."""
        if self.problems:
            raise ValidationError(self.problems)

    def flag(self, param: str, container: dict | None = None) -> bool:
        value = (self.fields if container is None else container).get(param.rpartition(".")[2])
        if value is not None and not isinstance(value, bool):
            self.refuse(param, _("Must be true or false."))
        return value is True

    def model(self) -> str:
        model = self.get("model")
        if not isinstance(model, str) or not model:
            message = _("Name a model; GET /v1/models lists them.")
            self.refuse("model", message, "missing_required_parameter")
        return model

    def whole(self, param: str, least: int, most: int, default: int | None) -> int | None:
        value = as_whole(self.get(param))
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            bounds = {"least": f"{least:,}", "most": f"{most:,}"}
            self.refuse(param, _("Must be between %(least)s and %(most)s.") % bounds)
            return default
        return value

    def neutral(self) -> None:
        if self.get("tool_choice") == "none":  # tools are there and shall not be used
            self.fields = {**self.fields, "tools": None, "functions": None}
        for param, values in NEUTRAL.items():
            value = self.get(param)
            if value is not None and value not in values:
                self.unsupported(param)

    def stream(self) -> tuple[bool, bool]:
        """(whether to stream, whether with the usage at its end)"""
        stream, options = self.flag("stream"), self.get("stream_options")
        if options is not None and not isinstance(options, dict):
            self.refuse("stream_options", _("Must be an object."))
        if not isinstance(options, dict):
            return stream, False
        return stream, self.flag("stream_options.include_usage", options)

    def numbers(self) -> dict:
        """The sampling parameters that are numbers, by our names."""
        values = {}
        for theirs, ours in SAMPLING.items():
            value = self.get(theirs)
            if value is None or (ours == "max_new_tokens" and value == -1):
                continue  # -1: as much as there is
            if theirs == "top_k" and value == -1:  # vLLM's way to say off
                value = 0
            if theirs == "top_p" and value == 0 and not isinstance(value, bool):
                values["do_sample"] = False  # nothing but the best token, as OpenAI takes it
                continue
            if ours == "max_new_tokens" and isinstance(value, (int, float)):
                value = min(value, LIMITS[ours].high)  # cut to what fits anyway
            problem = number_problem(ours, value)
            if problem:
                self.refuse(theirs, problem)
            else:
                values[ours] = value
        return values

    def json_schema(self, param: str, wanted) -> str | None:
        """The schema, as text, of a `response_format` (or a Response's `text.format`)."""
        if wanted is None or wanted == {"type": "text"}:
            return None
        kind = wanted.get("type") if isinstance(wanted, dict) else None
        if kind == "json_object":
            return '{"type": "object"}'
        if kind != "json_schema":
            self.refuse(f"{param}.type", _("The types are text, json_object and json_schema."))
            return None
        schema = wanted.get("json_schema", wanted)
        schema = schema.get("schema") if isinstance(schema, dict) else None
        text = json.dumps(schema)
        if not isinstance(schema, dict) or len(text) > LONGEST_SCHEMA:
            message = _("Needs a JSON schema of up to %(most)s characters.")
            self.refuse(f"{param}.json_schema", message % {"most": f"{LONGEST_SCHEMA:,}"})
            return None
        return text

    def samplings(self, prompts: int = 1) -> list[dict]:
        """The sampling parameters of every choice, `n` for each of the prompts."""
        values = {
            **self.numbers(),
            "stop": self._stops(),
            "logit_bias": self._logit_bias(),
        }
        seed = self.whole("seed", -(2**63), 2**63 - 1, None)
        count = self.whole("n", 1, MOST_CHOICES, 1) or 1
        # choices of one seed would be the same answer again
        return [
            {**values, "seed": None if seed is None else (seed + i) % 2**63} for i in range(count)
        ] * prompts

    def _stops(self) -> tuple[str, ...]:
        stop = self.get("stop")
        stops = [stop] if isinstance(stop, str) else stop or []
        if isinstance(stops, list):
            stops = [text for text in stops if text != ""]  # forms send an empty one for none
        if (
            not isinstance(stops, list)
            or len(stops) > MOST_STOPS
            or not all(isinstance(text, str) and is_storable(text) for text in stops)
        ):
            message = _("Must be a text or a list of up to %(most)s texts.")
            self.refuse("stop", message % {"most": MOST_STOPS})
            return ()
        return tuple(stops)

    def _logit_bias(self) -> tuple[tuple[int, float], ...]:
        bias = self.get("logit_bias")
        if not bias and not isinstance(bias, (bool, int, float)):
            return ()
        try:
            pairs = tuple((int(token), float(value)) for token, value in bias.items())
        except (AttributeError, TypeError, ValueError, OverflowError):
            pairs = ((-1, 0.0),)
        if len(pairs) > MOST_BIASES or not all(
            0 <= token < 2**31 and -100 <= value <= 100 for token, value in pairs
        ):
            message = _("Must be an object of up to %(most)s token ids with -100 to 100 each.")
            self.refuse("logit_bias", message % {"most": f"{MOST_BIASES:,}"})
            return ()
        return pairs


def chat_request(fields) -> ChatRequest:
    """ValidationError({param: ...}) naming every problem of the body."""
    body = Body.of(fields)
    tools = offered(body)
    body.neutral()
    model = body.model()
    messages = turns_of(body.get("messages"), body.refuse)
    if body.get("with_history") is not None and not body.flag("with_history"):
        messages = without_history(messages)
    logprobs, thinking = _logprobs(body), _thinking(body)
    schema = body.json_schema("response_format", body.get("response_format"))
    more = {"logprobs": logprobs, "json_schema": schema, "thinking": thinking}
    samplings = [{**each, **more} for each in body.samplings()]
    stream, include_usage = body.stream()
    body.check()
    return ChatRequest(model, messages, samplings, stream, include_usage, tools)


def _thinking(body: Body) -> bool | None:
    """`enable_thinking`, as vLLM and SGLang take it (chat_template_kwargs) or by itself."""
    container = body.get("chat_template_kwargs")
    if container is not None and not isinstance(container, dict):
        body.refuse("chat_template_kwargs", _("Must be an object."))
        container = None
    container = container or {}
    others = sorted(container.keys() - {"enable_thinking", "thinking"})
    if others:
        body.unsupported(f"chat_template_kwargs.{others[0]}")
    found = None
    for param, place in (
        ("enable_thinking", body.fields),
        ("chat_template_kwargs.thinking", container),
        ("chat_template_kwargs.enable_thinking", container),
    ):
        if place.get(param.rpartition(".")[2]) is not None:
            found = body.flag(param, place)
    return found


def _logprobs(body: Body) -> int | None:
    wanted, top = body.flag("logprobs"), as_whole(body.get("top_logprobs"))
    if top is not None and (top or isinstance(top, bool)):
        problem = number_problem("logprobs", top)
        if problem or not wanted:
            body.refuse("top_logprobs", problem or _("Needs logprobs to be true."))
            return None
    return (top or 0) if wanted else None
