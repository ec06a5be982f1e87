"""Sampling parameters as people send them: checked here for every door, kept on the answer's row as
they were sent.
"""

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from chat.engine.request import LIMITS, SamplingParams
from portal.text import shown

# What people may send; `stop`, `logprobs` and `max_length` are the scripts' doors' alone.
NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_new_tokens",
    "seed",
    "prefix_strength",
)
FLAGS = ("do_sample", "thinking")


def as_whole(value):
    """512.0 as 512, since some languages' JSON spells whole numbers so; all else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number_problem(name: str, value) -> str | None:
    """Why `value` cannot be the sampling parameter `name`, in the reader's language; None when it
    is fine. True and "0.5" are not numbers; 512.0 is 512.
    """
    limits = LIMITS[name]
    whole, value = limits.kind is int, as_whole(value)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return _("Must be a whole number.") if whole else _("Must be a number.")
    if value not in limits:
        bounds = {"least": f"{limits.low:,}", "most": f"{limits.high:,}"}
        if limits.above:
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
        if name not in NUMBERS and name not in FLAGS:
            problem = _("There is no such parameter.")
        elif value is None:
            continue
        elif name in FLAGS:
            problem = None if isinstance(value, bool) else _("Must be true or false.")
        else:
            problem = number_problem(name, value)
        if problem:
            problems[f"sampling.{shown(name)}"] = ValidationError(problem, "invalid_value")
        else:
            kept[name] = value
    if problems:
        raise ValidationError(problems)
    return kept


def as_sampling(values: dict, wishes: dict | None = None) -> SamplingParams:
    """The engine's Sampling of checked values; what they leave open is as `wishes`
    (Checkpoint.sampling) or the engine has it.
    """
    chosen = {**(wishes or {}), **values}
    for name in chosen.keys() & LIMITS.keys():
        if LIMITS[name].kind is int:
            chosen[name] = as_whole(chosen[name])
    return SamplingParams(
        **{
            **chosen,
            "stop": tuple(chosen.get("stop") or ()),
            "logit_bias": tuple(chosen.get("logit_bias") or ()),
        }
    )
