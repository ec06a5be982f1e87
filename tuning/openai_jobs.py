"""/v1/fine_tuning/jobs as OpenAI's clients know them: the portal's tuning runs."""

from dataclasses import fields

from django.core.exceptions import ValidationError
from django.db import transaction
from django.http import Http404, HttpResponseBase, JsonResponse
from django.utils.translation import gettext as _

from chat.api.openai import for_scripts_in_thread, parsed_body
from chat.api.openai_pages import listed, listed_whole, number_of
from chat.models import Checkpoint
from portal.access import get_visible
from portal.models import Run
from portal.rest.conventions import READABLE, json_error
from portal.runs import lifecycle
from portal.runs.once import once
from tuning.datasets.store import TRAIN
from tuning.models import TuningRun
from tuning.openai_files import dataset_of, file_id
from tuning.plan import PRESETS, create_run, default_preset, recipe_for, steps_of
from tuning.ptuning.recipe import Recipe

# OpenAI's word -> ours; every hyper-parameter of ours is taken under its own name, too
OURS = {"prefix_len": "pre_seq_len"}
NAMES = {field.name for field in fields(Recipe)}
MOST = 1_000_000  # epochs, examples at once, times the usual rate


@for_scripts_in_thread("POST", "GET", "HEAD", scope="tuning")
def jobs(request, user) -> HttpResponseBase:
    """POST, GET /v1/fine_tuning/jobs"""
    if request.method == "POST":
        body, key = parsed_body(request), request.headers.get("Idempotency-Key", "")
        return _job(once(user, key, [request.path, body], lambda: _created(body, user)))
    return listed(request, _runs(user), "ftjob-", told)


@for_scripts_in_thread("GET", "HEAD", scope="tuning")
def job(request, user, name: str) -> HttpResponseBase:
    return _job(_run(user, name))


@for_scripts_in_thread("POST", scope="tuning")
def cancel(request, user, name: str) -> HttpResponseBase:
    run = _run(user, name)
    if not TuningRun.objects.changeable_by(user).filter(pk=run.pk).exists():
        return json_error(403, _("Only the owner may change this."), code="permission_denied")
    if run.status not in Run.ACTIVE:
        message = _("The job has ended: %(status)s.") % {"status": run.status}
        return json_error(400, message, code="invalid_state")
    lifecycle.cancel(run)
    return _job(_run(user, name))


@for_scripts_in_thread("POST", scope="tuning")
def pause(request, user, name: str) -> HttpResponseBase:
    """It stops after its step with its state saved."""
    run = _run(user, name)
    if not TuningRun.objects.changeable_by(user).filter(pk=run.pk).exists():
        return json_error(403, _("Only the owner may change this."), code="permission_denied")
    if run.status not in Run.ACTIVE:
        message = _("The job has ended: %(status)s.") % {"status": status_of(run)}
        return json_error(400, message, code="invalid_state")
    lifecycle.cancel(run, to_go_on=True)
    return _job(_run(user, name))


@for_scripts_in_thread("POST", scope="tuning")
def resume(request, user, name: str) -> HttpResponseBase:
    run = _run(user, name)
    if not TuningRun.objects.changeable_by(user).filter(pk=run.pk).exists():
        return json_error(403, _("Only the owner may change this."), code="permission_denied")
    if status_of(run) != "paused" or not lifecycle.resume(run):
        message = _("The job is not paused: %(status)s.") % {"status": status_of(run)}
        return json_error(400, message, code="invalid_state")
    return _job(_run(user, name))


def status_of(run: TuningRun) -> str:
    """Our words are OpenAI's; a run that was stopped in order to go on is `paused` there."""
    return "paused" if run.paused and run.status == Run.Status.CANCELLED else str(run.status)


@for_scripts_in_thread("GET", "HEAD", scope="tuning")
def events(request, user, name: str) -> HttpResponseBase:
    """Newest first."""
    return listed_whole(request, _events(_run(user, name))[::-1])


@for_scripts_in_thread("GET", "HEAD", scope="tuning")
def checkpoints(request, user, name: str) -> HttpResponseBase:
    """The adapters that the job has made."""
    run = _run(user, name)
    found = [
        {
            "id": f"ftckpt-{adapter.pk}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": int(adapter.created_at.timestamp()),
            "fine_tuned_model_checkpoint": adapter.name,
            "fine_tuning_job_id": f"ftjob-{run.pk}",
            "metrics": {"step": adapter.step, "train_loss": run.loss},
            "step_number": adapter.step,
        }
        for adapter in run.adapters.order_by("-pk")
    ]
    return listed_whole(request, found)


def _runs(user):
    found = TuningRun.objects.visible_to(user).select_related("checkpoint", "dataset_version")
    return found.prefetch_related("adapters")


def _run(user, name: str) -> TuningRun:
    return get_visible(_runs(user), user, pk=number_of(name, "ftjob-"))


def _job(run: TuningRun) -> JsonResponse:
    return JsonResponse(told(run), json_dumps_params=READABLE)


def _created(body, user) -> TuningRun:
    if not isinstance(body, dict):
        message = _("The body must be a JSON object.")
        raise ValidationError({"__all__": ValidationError(message, "invalid_json")})
    problems: dict[str, ValidationError] = {}

    def refuse(param: str, message: str, code: str = "invalid_value") -> None:
        problems.setdefault(param, ValidationError(message, code))

    checkpoint = Checkpoint.objects.visible_to(user).named(body.get("model"))
    if checkpoint is None:
        refuse("model", _("Name a checkpoint; GET /v1/models lists them."), "model_not_found")
    datasets = {}
    for param in ("training_file", "validation_file"):
        if body.get(param) is None and param == "validation_file":
            continue
        try:
            datasets[param] = dataset_of(user, str(body.get(param) or ""))
        except Http404:
            refuse(param, _("There is no such file; GET /v1/files lists them."), "not_found")
    method = body.get("method") or {"type": "supervised"}
    kind = method.get("type") if isinstance(method, dict) else None
    if kind != "supervised":
        refuse("method.type", _("The method is “supervised”."), "unsupported_parameter")
    own = method.get("supervised") if isinstance(method, dict) else None
    given = [
        body.get("hyperparameters"),
        own.get("hyperparameters") if isinstance(own, dict) else None,
    ]
    if not all(isinstance(part or {}, dict) for part in given):
        refuse("hyperparameters", _("Must be an object."))
    if body.get("integrations"):
        refuse("integrations", _("This parameter is not supported here."), "unsupported_parameter")
    suffix, seed = body.get("suffix"), body.get("seed")
    if suffix is not None and not isinstance(suffix, str):
        refuse("suffix", _("Must be a text."))
    if problems:
        raise ValidationError(problems)
    assert checkpoint is not None  # or there was a problem
    dataset = datasets["training_file"]
    hyper = _hyper({**(given[0] or {}), **(given[1] or {})}, checkpoint, dataset)
    if seed is not None:
        hyper["seed"] = seed
    with transaction.atomic():
        run = create_run(user, dataset=dataset, checkpoint=checkpoint, name=suffix or "", **hyper)
        validation = datasets.get("validation_file")
        run.recipe = {
            **run.recipe,
            "metadata": body.get("metadata") or {},
            "validation_file": validation and file_id(validation),
        }
        run.save(update_fields=["recipe"])
    return run


def _hyper(given, checkpoint: Checkpoint, dataset) -> dict:
    """Our hyper-parameters of OpenAI's, "auto" being the preset's; ValidationError."""

    def refused(name: str, message: str, code: str = "invalid_value") -> ValidationError:
        return ValidationError({f"hyperparameters.{name}": ValidationError(message, code)})

    given = {name: value for name, value in given.items() if value not in (None, "auto")}
    numbers = {}
    for name in ("n_epochs", "batch_size", "learning_rate_multiplier"):
        value = given.pop(name, None)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise refused(name, _("Must be a number."))
            if not 0 < value <= MOST:
                bounds = {"least": 0, "most": f"{MOST:,}"}
                raise refused(name, _("Must be above %(least)s and at most %(most)s.") % bounds)
            numbers[name] = value
    hyper = {OURS.get(name, name): value for name, value in given.items()}
    unknown = sorted(set(hyper) - NAMES)
    if unknown:
        raise refused(unknown[0], _("There is no such hyper-parameter."), "unknown_field")
    usual = PRESETS[default_preset(checkpoint)]
    if "batch_size" in numbers:
        # as many at once as the preset dares, the rest accumulated
        size, at_once = int(numbers["batch_size"]), usual.per_device_train_batch_size
        at_once = at_once if size % at_once == 0 else 1 if at_once == 1 else size
        hyper["per_device_train_batch_size"] = at_once
        hyper["gradient_accumulation_steps"] = size // at_once
    if "learning_rate_multiplier" in numbers:
        hyper["learning_rate"] = usual.learning_rate * numbers["learning_rate_multiplier"]
    version = dataset.current
    if "n_epochs" in numbers and version is not None:
        rows = version.splits.get(TRAIN, {}).get("rows", 0)
        steps = steps_of(numbers["n_epochs"], recipe_for(checkpoint, **hyper), rows)
        hyper["max_steps"] = steps
    return hyper


def told(run: TuningRun) -> dict:
    recipe = Recipe.from_dict(run.recipe)
    usual = PRESETS[default_preset(run.checkpoint)]
    rows = run.recipe["dataset"]["rows"]
    hyper = {
        "n_epochs": max(1, round(recipe.max_steps * recipe.samples_per_step / max(1, rows))),
        "batch_size": recipe.samples_per_step,
        "learning_rate_multiplier": round(recipe.learning_rate / usual.learning_rate, 6),
    }
    adapter = max(run.adapters.all(), key=lambda adapter: adapter.pk, default=None)
    error = run.error or {}
    return {
        "id": f"ftjob-{run.pk}",
        "object": "fine_tuning.job",
        "created_at": int(run.created_at.timestamp()),
        "error": {"code": error["code"], "message": error["message"], "param": None}
        if error
        else None,
        "estimated_finish": None,
        "fine_tuned_model": adapter.name if adapter else None,
        "finished_at": run.finished_at and int(run.finished_at.timestamp()),
        "hyperparameters": hyper,
        "integrations": [],
        "metadata": run.recipe.get("metadata") or {},
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {**hyper, "prefix_len": recipe.pre_seq_len}},
        },
        "model": run.checkpoint.name,
        "organization_id": "portal",
        "result_files": [],
        "seed": recipe.seed,
        "status": status_of(run),
        "trained_tokens": None,
        "training_file": f"file-{run.dataset_version.dataset_id}",
        "validation_file": run.recipe.get("validation_file"),
    }


def _events(run: TuningRun) -> list[dict]:
    """What has happened, oldest first."""
    found: list[dict] = []

    def happened(at, message: str, level: str = "info", data: dict | None = None) -> None:
        found.append(
            {
                "id": f"ftevent-{run.pk}-{len(found)}",
                "object": "fine_tuning.job.event",
                "created_at": int(at.timestamp()),
                "level": level,
                "message": message,
                "type": "metrics" if data else "message",
                "data": data or {},
            }
        )

    happened(run.created_at, f"Created fine-tuning job: ftjob-{run.pk}")
    if run.started_at:
        happened(run.started_at, "Fine-tuning job started")
    for metric in run.metrics.all():
        data = {
            "step": metric.step,
            "train_loss": metric.loss,
            "total_steps": run.total,
            "learning_rate": metric.learning_rate,
        }
        message = f"Step {metric.step}/{run.total}: training loss={metric.loss:.2f}"
        happened(metric.created_at, message, data=data)
    for adapter in run.adapters.order_by("pk"):
        happened(adapter.created_at, f"New fine-tuned model created: {adapter.name}")
    if run.finished_at and run.status == Run.Status.SUCCEEDED:
        happened(run.finished_at, "The job has successfully completed")
    elif run.finished_at and run.status == Run.Status.FAILED:
        reason = (run.error or {}).get("message", "")
        happened(run.finished_at, f"The job failed: {reason}", "error")
    elif run.finished_at and run.paused:
        happened(run.finished_at, "The job was paused", "info")
    elif run.finished_at:
        happened(run.finished_at, "The job was cancelled", "warn")
    return found
