"""What an evaluation will do, frozen when it is created: rows, model, decoding, lengths. Pages,
REST and commands all come here.
"""

from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils.translation import gettext as _

from chat.models import Adapter, Checkpoint
from evaluation.models import EvaluationRun
from portal.models import Run
from portal.runs import lifecycle
from tuning.models import Dataset
from tuning.plan import PRESETS, default_preset, frozen_inputs

SEED = 42
LONGEST = 8192


def create_evaluation(
    owner,
    *,
    dataset: Dataset,
    checkpoint: Checkpoint,
    adapter: Adapter | None = None,
    decoding: str = EvaluationRun.Decoding.GREEDY,
    max_examples: int | None = None,
    with_baseline: bool = True,
    split: str = "",
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    seed: int = SEED,
    quantization_bit: int | None = None,
    name: str = "",
    in_queue: bool = True,
) -> EvaluationRun:
    """Queues an evaluation; with an adapter, the same of the bare checkpoint goes before it unless
    there is one already.

    `split`: default validation, or train where there is no validation split. Lengths in tokens:
    default the adapter's own from its tuning run, else those that the checkpoint would be tuned
    with (ChatGLM-6B: evaluate.sh's 64). quantization_bit: 0, 4 or 8; None: as the adapter was
    tuned. in_queue=False leaves the bell unrung, for who carries the
    run out itself. Raises ValidationError with every problem by field.
    """
    tuned = adapter.run.recipe if adapter is not None and adapter.run is not None else {}
    usual = PRESETS[default_preset(checkpoint)]
    lengths = (
        tuned.get("max_source_length", usual.max_source_length)
        if max_source_length is None
        else max_source_length,
        tuned.get("max_target_length", usual.max_target_length)
        if max_target_length is None
        else max_target_length,
    )
    version = dataset.current if dataset.deleted_at is None else None
    split = split or (version.split_for_evaluation() if version else "")
    problems = _problems(
        dataset, version, split, checkpoint, adapter, decoding, max_examples, lengths, seed
    )
    if quantization_bit and not checkpoint.family.can_quantize:
        message = _("Only ChatGLM-6B checkpoints can be quantised on loading.")
        problems["quantization_bit"] = ValidationError(message, code="not_supported")
    if problems:
        raise ValidationError(problems)
    assert version is not None  # or there was a problem
    available = version.splits[split]["rows"]
    rows = min(max_examples or available, available)
    recipe = {
        **frozen_inputs(version, split, checkpoint),
        "rows": rows,  # of the split's, the first so many
        "decoding": str(decoding),
        "seed": seed,
        # as evaluate.sh: the base as it was tuned on
        "quantization_bit": tuned.get("quantization_bit")
        if quantization_bit is None
        else quantization_bit or None,
        "max_source_length": lengths[0],
        "max_target_length": lengths[1],
    }
    plan = {
        "owner": owner,
        "kind": Run.Kind.EVALUATION,
        "dataset_version": version,
        "split": split,
        "checkpoint": checkpoint,
        "decoding": decoding,
        "max_examples": max_examples,
        "total": rows,
    }
    with transaction.atomic():
        baseline = None
        if adapter is not None and with_baseline:
            baseline = _baseline(owner, recipe) or _enqueued(
                EvaluationRun(
                    **plan, name=f"{checkpoint.name} · {dataset.name}"[:120], recipe=recipe
                )
            )
        if adapter is not None:
            recipe = {
                **recipe,
                "adapter": {
                    "name": adapter.name,
                    "sha256": adapter.sha256,
                    "pre_seq_len": adapter.pre_seq_len,
                },
            }
        name = name.strip() or f"{adapter.name if adapter else checkpoint.name} · {dataset.name}"
        run = EvaluationRun(
            **plan, adapter=adapter, baseline=baseline, name=name[:120], recipe=recipe
        )
        return _enqueued(run, in_queue)


def _enqueued(run: EvaluationRun, in_queue: bool = True) -> EvaluationRun:
    lifecycle.enqueue(run, ring_bell=in_queue)
    return run


def _baseline(owner, recipe: dict) -> EvaluationRun | None:
    """A run of the bare checkpoint that does, or did, exactly this and that `owner` may see: the
    same weights, rows and decoding, whatever checkpoint and dataset are called by now.
    """
    candidates = (
        EvaluationRun.objects.visible_to(owner)
        .filter(
            adapter=None,
            status__in=(*Run.ACTIVE, Run.Status.SUCCEEDED),
            recipe__checkpoint__fingerprint=recipe["checkpoint"]["fingerprint"],
            recipe__dataset__sha256=recipe["dataset"]["sha256"],
        )
        .defer("general")
    )
    wanted = _computed(recipe)
    return next((run for run in candidates if _computed(run.recipe) == wanted), None)


def _computed(recipe: dict) -> dict:
    """What of a recipe decides the predictions; names and numbers of rows of the database do
    not.
    """
    return {
        **{name: value for name, value in recipe.items() if name not in ("dataset", "checkpoint")},
        "weights": recipe["checkpoint"]["fingerprint"],
        "rows_of": (recipe["dataset"]["split"], recipe["dataset"]["sha256"]),
    }


def _problems(
    dataset, version, split, checkpoint, adapter, decoding, max_examples, lengths, seed
) -> dict:
    problems: dict[str, ValidationError] = {}
    if version is None:
        problems["dataset"] = ValidationError(
            _("The dataset is not ready, or has been deleted."), code="not_ready"
        )
    elif split not in version.splits:
        problems["split"] = ValidationError(
            _("There is no such split. There are: %(splits)s.")
            % {"splits": ", ".join(version.splits)},
            code="invalid",
        )
    if adapter is not None and adapter.checkpoint_id != checkpoint.pk:
        problems["adapter"] = ValidationError(
            _("The adapter “%(adapter)s” belongs to the checkpoint “%(checkpoint)s”.")
            % {"adapter": adapter.name, "checkpoint": adapter.checkpoint.name},
            code="other_checkpoint",
        )
    if decoding not in EvaluationRun.Decoding.values:
        problems["decoding"] = ValidationError(_("Decoding is greedy or upstream."), code="invalid")
    if max_examples is not None and not 0 < max_examples < 2**31:
        message = _("Must be between %(least)s and %(most)s.") % {"least": 1, "most": 2**31 - 1}
        problems["max_examples"] = ValidationError(message, code="out_of_range")
    if not 0 <= seed < 2**31:
        problems["seed"] = ValidationError(
            _("A seed lies between 0 and 2147483647."), code="out_of_range"
        )
    limit = min(int(checkpoint.description.get("context_length") or LONGEST), LONGEST)
    for field, value, least in (
        ("max_source_length", lengths[0], 4),
        ("max_target_length", lengths[1], 3),
    ):
        if not least <= value <= limit:
            problems[field] = ValidationError(
                _("Between %(least)s and %(most)s tokens.") % {"least": least, "most": limit},
                code="out_of_range",
            )
    if not problems and sum(lengths) > limit:
        problems["max_target_length"] = ValidationError(
            _(
                "Source and target together are longer than the checkpoint's context of %(limit)s "
                "tokens."
            )
            % {"limit": limit},
            code="out_of_range",
        )
    return problems
