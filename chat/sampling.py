"""Sampling parameters as people send them: checked here for every door, kept on the answer's row as
they were sent.
"""

from dataclasses import dataclass

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from chat.engine.request import Sampling
from chat.text import shown


@dataclass(frozen=True)
class Number:
    """What one parameter may be. `above` excludes the lower bound itself."""

    kind: type
    least: float
    most: float
    above: bool = False


# One table for pages, REST, websocket and the OpenAI API; the names are those of
# chat.engine.request.Sampling.
NUMBERS = {
    "temperature": Number(float, 0, 2),
    "top_p": Number(float, 0, 1, above=True),
    "top_k": Number(int, 0, 1_000_000),
    "repetition_penalty": Number(float, 0, 10, above=True),
    "max_new_tokens": Number(int, 1, 1_000_000),
    "seed": Number(int, 0, 2**63 - 1),
}


def number_problem(value, rule: Number) -> str | None:
    """Why `value` breaks `rule`, in the reader's language; None when it is fine. True and "0.5" are
    not numbers.
    """
    if isinstance(value, bool) or not isinstance(
        value, (int, float) if rule.kind is float else int
    ):
        return _("Must be a number.") if rule.kind is float else _("Must be a whole number.")
    # not-a-number lies nowhere
    if not rule.least <= value <= rule.most or (rule.above and value == rule.least):
        bounds = {"least": f"{rule.least:,}", "most": f"{rule.most:,}"}
        if rule.above:
            return _("Must be above %(least)s and at most %(most)s.") % bounds
        return _("Must be between %(least)s and %(most)s.") % bounds
    return None


def checked(values) -> dict:
    """`values` without the Nones, ready for Message.sampling; ValidationError({field: ...}) with
    every problem at once.
    """
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValidationError({"sampling": ValidationError(_("Must be an object."), "invalid")})
    problems, kept = {}, {}
    for name, value in values.items():
        if name not in NUMBERS and name != "do_sample":
            problem = _("There is no such parameter.")
        elif value is None:
            continue
        elif name == "do_sample":
            problem = None if isinstance(value, bool) else _("Must be true or false.")
        else:
            problem = number_problem(value, NUMBERS[name])
        if problem:
            problems[f"sampling.{shown(name)}"] = ValidationError(problem, "invalid_value")
        else:
            kept[name] = value
    if problems:
        raise ValidationError(problems)
    return kept


def as_sampling(values: dict, wishes: dict | None = None) -> Sampling:
    """The engine's Sampling of checked values; what they leave open is as `wishes`
    (Checkpoint.sampling) or the engine has it.
    """
    chosen = {**(wishes or {}), **values}
    return Sampling(**{**chosen, "stop": tuple(chosen.get("stop") or ())})
