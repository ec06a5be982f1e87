"""Sweeps: one run that trains several prefixes side by side, each with a few settings of its own
(tuning/ptuning/sweep.py), and offers the one with the lowest validation loss first. No torch.

A run's recipe holds the settings that they share, and under "sweep" what each changes:
[{"seed": 1}, {"seed": 1, "learning_rate": 0.01}].
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from chat.checkpoints import memory
from chat.models import Checkpoint
from tuning.ptuning.recipe import BOOLEANS, CHOICES, LIMITS, TEXTS, WHOLE_NUMBERS, Recipe

FEWEST, MOST = 2, 8
# What variants may differ in: how a prefix begins and how it learns. Examples a step, lengths,
# steps and the base are what they share.
VARIED = (
    "seed",
    "learning_rate",
    "pre_seq_len",
    "init",
    "init_text",
    "init_adapter",
    "freeze_first",
    "prefix_projection",
    "prefix_dropout",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "kl_weight",
    "kl_share",
)


def variants_of(recipe: Mapping[str, Any]) -> list[Recipe]:
    """The recipe of each variant of a run's plan; [] when it is no sweep."""
    return [Recipe.from_dict({**recipe, **changes}) for changes in recipe.get("sweep") or ()]


def parsed(text: str) -> list[dict[str, Any]]:
    """A sweep as people write it: one variant a line, `learning_rate=1e-2 seed=7`, values with
    spaces in quotes. ValidationError.
    """
    found: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            words = shlex.split(line.replace(",", " "))
        except ValueError as error:
            raise _fault(len(found) + 1, str(error)) from error
        changes = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals:
                message = _("“%(word)s” is not of the form name=value") % {"word": word[:60]}
                raise _fault(len(found) + 1, message)
            changes[name.replace("-", "_")] = _typed(name.replace("-", "_"), value)
        if changes:
            found.append(changes)
    return found


def as_text(sweep: Sequence[Mapping[str, Any]]) -> str:
    """What `parsed` reads as `sweep`."""
    return "\n".join(
        " ".join(f"{name}={shlex.quote(_word(value))}" for name, value in changes.items())
        for changes in sweep
    )


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _typed(name: str, value: str) -> Any:
    """The value as the recipe has it; as it is where it cannot be one, for the recipe to refuse."""
    try:
        if name in WHOLE_NUMBERS:
            return int(value)
        if name in LIMITS:
            return float(value)
    except ValueError:
        return value
    if name in BOOLEANS:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(
            value.lower(), value
        )
    return value


def checked(
    sweep: Any, complete: Callable[[dict[str, Any]], tuple[dict[str, Any], Recipe]]
) -> tuple[list[dict[str, Any]], list[Recipe]]:
    """The variants as they are to be frozen, and the recipe of each. complete: (a variant's
    changes) -> (the same with what they imply, its recipe); ValidationError with its problems.
    Raises ValidationError that names every variant that is at fault.
    """
    if not isinstance(sweep, (list, tuple)) or not FEWEST <= len(sweep) <= MOST:
        message = _("A sweep has %(fewest)s to %(most)s variants.")
        raise ValidationError(message % {"fewest": FEWEST, "most": MOST}, "sweep_size")
    faults: list[ValidationError] = []
    frozen: list[dict[str, Any]] = []
    recipes: list[Recipe] = []
    for number, changes in enumerate(sweep, 1):
        try:
            whole, recipe = complete(_shaped(changes))
        except ValidationError as error:
            faults += [_fault(number, text) for text in _texts(error)]
            continue
        if recipe in recipes:
            first = recipes.index(recipe) + 1
            message = _("is the same as variant %(other)s") % {"other": first}
            faults.append(_fault(number, message))
        frozen.append(whole)
        recipes.append(recipe)
    if faults:
        raise ValidationError(faults)
    return frozen, recipes


def _shaped(changes: Any) -> dict[str, Any]:
    if not isinstance(changes, Mapping):
        raise ValidationError(_("must be an object of hyper-parameters"))
    wrong = [str(name)[:60] for name in changes if name not in VARIED]
    if wrong:
        message = _("%(names)s cannot differ between variants; these can: %(varied)s")
        names = {"names": ", ".join(wrong), "varied": ", ".join(VARIED)}
        raise ValidationError(message % names)
    for name, value in changes.items():
        if name in TEXTS and not isinstance(value, str):
            raise ValidationError(_("%(name)s must be text") % {"name": name})
        if name in CHOICES and isinstance(value, (list, dict)):
            raise ValidationError(_("%(name)s must be one value") % {"name": name})
    return dict(changes)


def _texts(error: ValidationError) -> list[str]:
    if not hasattr(error, "error_dict"):
        return error.messages
    return [f"{name}: {text}" for name, found in error.message_dict.items() for text in found]


def _fault(number: int, text: str) -> ValidationError:
    message = _("Variant %(number)s: %(problem)s")
    return ValidationError(message % {"number": number, "problem": text}, "invalid_variant")


def check_memory(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> None:
    """ValidationError when this machine's memory cannot hold the base and all the prefixes that
    learn, by the estimate of chat/checkpoints/memory.py; nothing where it knows too little.
    """
    precision = recipes[0].precision
    if recipes[0].quantization_bit:
        precision = f"int{recipes[0].quantization_bit}"
    elif precision in ("auto", "float16"):
        precision = "bfloat16"
    lengths = [recipe.pre_seq_len for recipe in recipes]
    longest = recipes[0].max_source_length + recipes[0].max_target_length
    estimate = memory.sweep(checkpoint.description, precision, lengths, longest)
    if estimate is None or estimate.fits:
        return
    message = _(
        "%(count)s prefixes at once need about %(needed)s GiB with the base; this machine has "
        "%(has)s GiB. Train fewer, or shorter ones."
    )
    gigabyte = 1 << 30
    raise ValidationError(
        message
        % {
            "count": len(recipes),
            "needed": f"{estimate.bytes / gigabyte:.1f}",
            "has": f"{estimate.available / gigabyte:.1f}",
        },
        "does_not_fit_in_memory",
    )
