"""What a tuning run will do, decided and checked once, when it is created. Torch-free: pages, REST
and commands call it.

The plan is frozen in `run.recipe`: hyper-parameters, the dataset version by its sha256 and the base
weights by their fingerprint. A later upload, another preset or a changed folder never changes what
a run means.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils.translation import gettext as _

from chat.engine.request import LONGEST_PREFIX
from chat.models import Adapter, Checkpoint
from portal.explanations import sentence
from portal.models import Run
from portal.runs import lifecycle
from portal.text import shown
from tuning import made_checkpoints, sweeps
from tuning.datasets import checks
from tuning.datasets.store import TRAIN, VALIDATION, examples
from tuning.explanations import UNUSABLE_RECIPE
from tuning.models import Dataset, DatasetVersion, TuningRun
from tuning.ptuning.encoded import REFUSE
from tuning.ptuning.recipe import FULL, LORA, MAX_SAMPLES_PER_STEP, METHOD, Problem, Recipe

# name -> hyper-parameters. The first, for the embedded model, is measured (docs/benchmarks.md), the
# second, for real ones, in part (its hold on the base's answers is not); `full` and `lora` are
# usual settings, not measured; the others are the scripts of ChatGLM-6B's ptuning/
# (docs/chatglm.md#8-training-rows).
PRESETS: dict[str, Recipe] = {
    "starter": Recipe(
        pre_seq_len=64,
        learning_rate=8e-2,
        lr_scheduler_type="cosine",
        max_steps=500,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        max_source_length=128,
        max_target_length=128,
        save_steps=100,
        kl_weight=2.0,
        kl_share=1.0,
        eval_steps=50,
    ),
    "general": Recipe(
        pre_seq_len=64,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        max_steps=500,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        max_source_length=128,
        max_target_length=128,
        save_steps=100,
        init="prompt",
        freeze_first=True,
        kl_weight=0.3,
        kl_share=0.25,
        eval_steps=50,
    ),
    "full": Recipe(
        method=FULL,
        learning_rate=2e-5,
        lr_scheduler_type="cosine",
        max_steps=300,
        warmup_steps=10,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        max_source_length=128,
        max_target_length=128,
        save_steps=300,
        eval_steps=50,
    ),
    "lora": Recipe(
        method=LORA,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        max_steps=300,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        max_source_length=128,
        max_target_length=128,
        save_steps=100,
        eval_steps=50,
    ),
    # four examples on each of four devices
    "chatglm-6b-ds_train_finetune.sh": Recipe(
        method=FULL,
        learning_rate=1e-4,
        max_steps=5000,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
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


def default_preset(checkpoint: Checkpoint, method: str = METHOD) -> str:
    if method != METHOD:
        return method
    return "starter" if checkpoint.is_starter else checkpoint.family.presets_key


def recommended_preset(checkpoint: Checkpoint) -> str:
    """What the page offers first, where the original's own settings are not what people come for:
    for real models a text start at a low rate, which was measured on one (docs/benchmarks.md), held
    to the base's own answers, which was measured on the starter alone. Programs that name no preset
    get `default_preset`, as ever.
    """
    usual = default_preset(checkpoint)
    return usual if checkpoint.is_starter or checkpoint.family.can_quantize else "general"


def recipe_for(checkpoint: Checkpoint, preset: str | None = None, **hyper: Any) -> Recipe:
    """The preset's recipe (that of the checkpoint if none is named) with `hyper` over it.
    ValidationError with all problems.
    """
    preset = preset or _usual_preset(checkpoint, hyper)
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
    if not checkpoint.family.can_quantize:
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


def _usual_preset(checkpoint: Checkpoint, hyper: dict[str, Any]) -> str:
    preset = default_preset(checkpoint, hyper.get("method") or METHOD)
    return preset if preset in PRESETS else default_preset(checkpoint)


def steps_of(epochs: float, recipe: Recipe, rows: int) -> int:
    """Steps in which every one of `rows` examples is seen `epochs` times."""
    return max(1, math.ceil(epochs * rows / recipe.samples_per_step))


def worded(problem: Problem) -> str:
    """What is wrong with a hyper-parameter, in the active language."""
    params = {"most": MAX_SAMPLES_PER_STEP, **problem.params}
    return sentence(UNUSABLE_RECIPE, problem.code, params)


def _misfits(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, list]:
    """What this checkpoint cannot do."""
    problems: dict[str, list] = {}
    if not checkpoint.path:
        message = _("“%(name)s” is served by another server; its weights are not here to be tuned.")
        problems["checkpoint"] = [
            ValidationError(message % {"name": checkpoint.name}, "no_weights")
        ]
    if recipe.quantization_bit and not checkpoint.family.can_quantize:
        message = _("Only ChatGLM-6B checkpoints can be quantised on loading.")
        problems["quantization_bit"] = [ValidationError(message, "not_supported")]
    context = checkpoint.description.get("context_length")
    needed = recipe.max_source_length + recipe.max_target_length
    if checkpoint.family.shifts_positions:
        needed += recipe.prefix_length
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
    sweep: list[dict[str, Any]] | None = None,
    in_queue: bool = True,
    **hyper: Any,
) -> TuningRun:
    """Checks everything, freezes the plan and puts the run into its queue. ValidationError({field:
    problems}), all at once.

    `hyper`: any of HYPER_PARAMETERS over the preset's. sweep: what each of several prefixes that
    are trained at once changes of them (tuning/sweeps.py). in_queue=False leaves the bell unrung,
    for who carries the run out itself.
    """
    problems: dict[str, list] = {}
    version = dataset.current
    if dataset.deleted_at is not None:
        problems["dataset"] = [ValidationError(_("The dataset has been deleted."), "deleted")]
    elif version is None or not version.splits.get(TRAIN, {}).get("rows"):
        problems["dataset"] = [
            ValidationError(_("The dataset has no rows to train on."), "not_ready")
        ]
    usual = preset or _usual_preset(checkpoint, hyper)
    planned = PRESETS.get(usual, Recipe())
    if sweep and not hyper.get("eval_steps"):
        # at the end at least: that is what the best is known by
        hyper["eval_steps"] = planned.eval_steps or hyper.get("max_steps", planned.max_steps)

    def complete(changes: dict[str, Any]) -> tuple[dict[str, Any], Recipe]:
        implied = _implied(owner, version, checkpoint, planned, {**hyper, **changes})
        return {**changes, **implied}, recipe_for(
            checkpoint, preset, **{**hyper, **changes, **implied}
        )

    try:
        implied, recipe = complete({})
        hyper |= implied
    except ValidationError as error:
        problems |= error.error_dict
    else:
        problems |= made_checkpoints.problems_of(owner, checkpoint, recipe)
        if recipe.early_stopping and version and VALIDATION not in version.splits:
            message = _("The dataset has no validation rows to stop by.")
            problems["early_stopping"] = [ValidationError(message, "no_validation_rows")]
        if recipe.overlong == REFUSE and version is not None:
            problems |= _too_long(version, checkpoint, recipe)
        if recipe.init == "prompt":
            problems |= _text_too_long(checkpoint, recipe)
    if sweep and not problems:
        try:
            sweep = _swept(sweep, complete, version, checkpoint, recipe)
        except ValidationError as error:
            problems["sweep"] = error.error_list
    name = str(name or "").strip()
    if len(name) > 120:
        problems["name"] = [ValidationError(_("A name has at most 120 characters."), "too_long")]
    if problems:
        raise ValidationError(problems)
    run = TuningRun(
        owner=owner,
        kind=Run.Kind.TUNING,
        name=name or f"{dataset.name}"[:120],
        dataset_version=version,
        checkpoint=checkpoint,
        total=recipe.max_steps,
        recipe={
            **recipe.as_dict(),
            **({"sweep": sweep} if sweep else {}),
            "preset": usual,
            **frozen_inputs(version, TRAIN, checkpoint),
        },
    )
    with transaction.atomic():
        lifecycle.enqueue(run, ring_bell=in_queue)
    return run


def _implied(
    owner, version, checkpoint: Checkpoint, planned: Recipe, hyper: dict
) -> dict[str, Any]:
    """What hyper-parameters about the start imply: a text that nobody wrote, the adapter by its
    content, with its length. ValidationError({field: ...}).
    """
    init, implied = hyper.get("init", planned.init), {}
    problems: dict[str, ValidationError] = {}
    if init == "prompt" and version is not None and not hyper.get("init_text"):
        implied["init_text"] = default_init_text(version)
    if init == "adapter" and hyper.get("init_adapter"):
        try:
            before = _adapter_of(owner, hyper["init_adapter"], checkpoint)
        except ValidationError as error:
            problems["init_adapter"] = error
        else:
            implied |= {"init_adapter": before.sha256, "pre_seq_len": before.pre_seq_len}
    if isinstance(wishes := hyper.get("beside", ""), str) and wishes.strip(" ,"):
        length = implied.get("pre_seq_len", hyper.get("pre_seq_len", planned.pre_seq_len))
        try:
            implied["beside"] = _beside(owner, wishes, checkpoint, length)
        except ValidationError as error:
            problems["beside"] = error
    if problems:
        raise ValidationError(problems)
    return implied


def _beside(owner, wishes: str, checkpoint: Checkpoint, pre_seq_len: Any) -> str:
    """The adapters that are to stand in front, by their sha256; ValidationError."""
    found = [
        _adapter_of(owner, wish.strip(), checkpoint) for wish in wishes.split(",") if wish.strip()
    ]
    for one in found:
        if isinstance(pre_seq_len, int) and one.pre_seq_len + pre_seq_len > LONGEST_PREFIX:
            message = _("“%(name)s” and this prefix have %(length)s positions; %(most)s fit.")
            length = one.pre_seq_len + pre_seq_len
            named = {"name": one.name, "length": length, "most": LONGEST_PREFIX}
            raise ValidationError(message % named, "does_not_fit")
    return ",".join(dict.fromkeys(one.sha256 for one in found))


def _swept(
    sweep, complete, version, checkpoint: Checkpoint, shared: Recipe
) -> list[dict[str, Any]]:
    """The variants as they are frozen; ValidationError. shared: the recipe without changes."""
    if shared.method != METHOD:
        raise ValidationError(_("Only prefixes can be trained several at once."), "not_supported")
    if shared.devices > 1:
        message = _("Several prefixes at once are trained on one device.")
        raise ValidationError(message, "not_supported")
    if version is None or VALIDATION not in version.splits:
        message = _("The dataset has no validation rows to find the best variant by.")
        raise ValidationError(message, "no_validation_rows")
    frozen, recipes = sweeps.checked(sweep, complete)
    if recipes[0].beside:
        message = _("Variants cannot be trained beside other tuned models.")
        raise ValidationError(message, "not_supported")
    sweeps.check_memory(checkpoint, recipes)
    return frozen


def _too_long(version: DatasetVersion, checkpoint: Checkpoint, recipe: Recipe) -> dict[str, list]:
    """Rows that the lengths would cut, where a check has counted them; else the trainer does."""
    report = checks.report_of(version, checkpoint)
    lengths = recipe.max_source_length, recipe.max_target_length
    told = checks.told_of_cuts(report, *lengths) if report else []
    return {"overlong": [ValidationError(line, "rows_too_long") for line in told]} if told else {}


def _text_too_long(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, list]:
    """A task's text that the prefix has no room for; what cannot be told here the trainer tells."""
    try:
        tokens = checks.task_tokens(checkpoint, recipe.init_text)
    except ValidationError:
        return {}
    if tokens <= recipe.pre_seq_len:
        return {}
    told = {"tokens": tokens, "room": recipe.pre_seq_len}
    message = sentence(UNUSABLE_RECIPE, "init_text_too_long", told)
    return {"init_text": [ValidationError(message, "init_text_too_long")]}


def _adapter_of(owner, wish, checkpoint: Checkpoint) -> Adapter:
    """An adapter of the checkpoint by its sha256, name or id; ValidationError."""
    visible = Adapter.objects.visible_to(owner)
    found = visible.filter(sha256=wish).first() or visible.named(wish)
    if found is None:
        message = _("“%(value)s” does not exist.")
        raise ValidationError(message % {"value": shown(wish)}, "does_not_exist")
    if found.checkpoint_id != checkpoint.pk:
        message = _(
            "The adapter “%(adapter)s” belongs to the checkpoint “%(its)s”, not to “%(chosen)s”."
        )
        names = {"adapter": found.name, "its": found.checkpoint.name, "chosen": checkpoint.name}
        raise ValidationError(message % names, "invalid_adapter")
    return found


def default_init_text(version: DatasetVersion) -> str:
    """What a prefix that begins as a text says of the task when nobody describes it: the columns'
    names, in the language of the first rows. Examples follow it anyway (ptuning/initial.py).
    """
    if not version.splits.get(TRAIN, {}).get("rows"):
        return ""
    columns = {
        "prompt": version.dataset.prompt_column or "prompt",
        "response": version.dataset.response_column or "response",
    }
    (first,) = examples(version, TRAIN, 0, 1)
    if any("\u4e00" <= letter <= "\u9fff" for letter in first["prompt"] + first["response"]):
        return "任务：根据 {prompt} 写出 {response}，内容、风格和长短都与例子一致。".format(
            **columns
        )
    return (
        "Task: write the {response} for a {prompt}, like the examples in content, style and length."
    ).format(**columns)


def frozen_inputs(version: DatasetVersion, split: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a run reads, in `Run.recipe`: the rows by their sha256, the base by its fingerprint."""
    entry = version.splits[split]
    return {
        "dataset": {
            "id": version.dataset_id,
            "name": version.dataset.name,
            "version": version.number,
            "split": split,
            "sha256": entry["sha256"],
            "rows": entry["rows"],
        },
        "checkpoint": {
            "id": checkpoint.pk,
            "name": checkpoint.name,
            "fingerprint": checkpoint.fingerprint,
        },
    }
