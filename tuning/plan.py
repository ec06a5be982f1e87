"""What a tuning run will do, decided and checked once, when it is created. Torch-free: pages, REST
and commands call it.

The plan is frozen in `run.recipe`: hyper-parameters, the dataset version by its sha256 and the base
weights by their fingerprint. A later upload, another preset or a changed folder never changes what
a run means.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils.translation import gettext as _

from chat.models import Checkpoint
from portal.models import Run
from portal.runs import lifecycle
from tuning.datasets.store import TRAIN
from tuning.models import Dataset, DatasetVersion, TuningRun
from tuning.ptuning.recipe import MAX_SAMPLES_PER_STEP, Problem, Recipe

METHOD = "ptuning_v2"
TASK = "tuning.tasks.run"

# name -> hyper-parameters. The first is for the embedded model (measured: docs/benchmarks.md), the
# others are the scripts of ChatGLM-6B's ptuning/ (SPEC 8).
PRESETS: dict[str, Recipe] = {
    "starter": Recipe(
        pre_seq_len=64,
        learning_rate=5e-2,
        lr_scheduler_type="cosine",
        max_steps=500,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        max_source_length=128,
        max_target_length=128,
        save_steps=100,
    ),
    "chatglm-6b-train.sh": Recipe(quantization_bit=4, prefix_dropout=0.1),
    "chatglm-6b-train_chat.sh": Recipe(
        learning_rate=1e-2,
        max_source_length=256,
        max_target_length=256,
        quantization_bit=4,
        prefix_dropout=0.1,
    ),
}
HYPER_PARAMETERS = tuple(field.name for field in fields(Recipe))


def is_chatglm(checkpoint: Checkpoint) -> bool:
    return str(checkpoint.description.get("architecture", "")).startswith("ChatGLM")


def default_preset(checkpoint: Checkpoint) -> str:
    return "starter" if checkpoint.is_starter else "chatglm-6b-train.sh"


def recipe_for(checkpoint: Checkpoint, preset: str | None = None, **hyper: Any) -> Recipe:
    """The preset's recipe (that of the checkpoint if none is named) with `hyper` over it.
    ValidationError with all problems.
    """
    preset = preset or default_preset(checkpoint)
    if preset not in PRESETS:
        message = _("There is no preset “%(name)s”. There are: %(names)s.")
        raise ValidationError(
            {
                "preset": ValidationError(
                    message % {"name": preset, "names": ", ".join(PRESETS)}, "unknown_preset"
                )
            }
        )
    unknown = sorted(set(hyper) - set(HYPER_PARAMETERS))
    if unknown:
        message = _("There is no such hyper-parameter.")
        raise ValidationError({name: ValidationError(message, "unknown_field") for name in unknown})
    values = PRESETS[preset].as_dict()
    if not is_chatglm(checkpoint):
        values["quantization_bit"] = None  # of the presets' base alone
    # a short run shall save once and log some steps
    if "max_steps" in hyper and isinstance(hyper["max_steps"], int):
        values["save_steps"] = max(1, min(values["save_steps"], hyper["max_steps"]))
    recipe = Recipe(**{**values, **hyper})
    problems: dict[str, list] = {}
    for problem in recipe.problems():
        problems.setdefault(problem.field, []).append(
            ValidationError(worded(problem), problem.code)
        )
    if not problems:
        problems = _misfits(recipe, checkpoint)
    if problems:
        raise ValidationError(problems)
    return recipe


def worded(problem: Problem) -> str:
    """What is wrong with a hyper-parameter, in the active language."""
    texts = {
        "not_a_number": _("A number is needed here."),
        "out_of_range": _("Must lie between %(low)s and %(high)s."),
        "not_a_choice": _("Must be one of: %(choices)s."),
        "too_many_samples": _("Batch size times accumulation may be at most %(most)s."),
        "warmup_too_long": _("There must be fewer warm-up steps than steps."),
    }
    return texts[problem.code] % {"most": MAX_SAMPLES_PER_STEP, **problem.params}


def _misfits(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, list]:
    """What this checkpoint cannot do."""
    problems: dict[str, list] = {}
    chatglm = is_chatglm(checkpoint)
    if not checkpoint.path:
        message = _("“%(name)s” is served by another server; its weights are not here to be tuned.")
        problems["checkpoint"] = [
            ValidationError(message % {"name": checkpoint.name}, "no_weights")
        ]
    if recipe.quantization_bit and not chatglm:
        message = _("Only ChatGLM-6B checkpoints can be quantised on loading.")
        problems["quantization_bit"] = [ValidationError(message, "not_supported")]
    context = checkpoint.description.get("context_length")
    # ChatGLM's prefix takes no positions (SPEC 6)
    needed = (
        recipe.max_source_length + recipe.max_target_length + (0 if chatglm else recipe.pre_seq_len)
    )
    if context and needed > context:
        message = _(
            "Prefix, prompt and response need %(needed)s positions; “%(name)s” has %(context)s."
        )
        parameters = {"needed": needed, "name": checkpoint.name, "context": context}
        problems["max_source_length"] = [ValidationError(message % parameters, "does_not_fit")]
    return problems


def create_run(
    owner,
    *,
    dataset: Dataset,
    checkpoint: Checkpoint,
    name: str = "",
    preset: str | None = None,
    in_queue: bool = True,
    **hyper: Any,
) -> TuningRun:
    """Checks everything, freezes the plan and puts the run into its queue. ValidationError({field:
    problems}), all at once.

    `hyper`: any of HYPER_PARAMETERS over the preset's. in_queue=False leaves the bell unrung, for
    who carries the run out itself.
    """
    problems: dict[str, list] = {}
    version = dataset.current
    if dataset.deleted_at is not None:
        problems["dataset"] = [ValidationError(_("The dataset has been deleted."), "deleted")]
    elif (
        dataset.status != Dataset.Status.READY
        or version is None
        or not version.splits.get(TRAIN, {}).get("rows")
    ):
        problems["dataset"] = [
            ValidationError(_("The dataset has no rows to train on."), "not_ready")
        ]
    try:
        recipe = recipe_for(checkpoint, preset, **hyper)
    except ValidationError as error:
        problems |= error.error_dict
    name = str(name or "").strip()
    if len(name) > 120:
        problems["name"] = [ValidationError(_("A name has at most 120 characters."), "too_long")]
    if problems:
        raise ValidationError(problems)
    run = TuningRun(
        owner=owner,
        kind=Run.Kind.TUNING,
        task=TASK,
        name=name or f"{dataset.name}"[:120],
        dataset_version=version,
        checkpoint=checkpoint,
        total=recipe.max_steps,
        recipe={
            **recipe.as_dict(),
            "method": METHOD,
            "preset": preset or default_preset(checkpoint),
            "dataset": _frozen_dataset(dataset, version),
            "checkpoint": {
                "id": checkpoint.pk,
                "name": checkpoint.name,
                "fingerprint": checkpoint.fingerprint,
            },
        },
    )
    with transaction.atomic():
        if in_queue:
            lifecycle.enqueue(run)
        else:
            run.save()
    return run


def _frozen_dataset(dataset: Dataset, version: DatasetVersion) -> dict[str, Any]:
    split = version.splits[TRAIN]
    return {
        "id": dataset.pk,
        "name": dataset.name,
        "version": version.number,
        "split": TRAIN,
        "sha256": split["sha256"],
        "rows": split["rows"],
    }
