"""Pages of tuning runs."""

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.core.paginator import Paginator
from django.http import JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils.http import content_disposition_header
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_POST

from chat.compositions import composed
from chat.models import Adapter, Checkpoint
from portal.access import get_visible
from portal.forms import add_errors
from portal.models import Run
from portal.numbers import whole_number
from portal.runs import lifecycle
from portal.runs.once import once_per_form
from tuning.curves import MOST_CURVES, chart, variant_label
from tuning.estimates import measured
from tuning.forms import LABELS, OF_LORA, TuningRunForm, as_shown
from tuning.models import Dataset, TuningRun
from tuning.plan import PRESETS, create_run, recommended_preset
from tuning.ptuning.recipe import LORA, Recipe
from tuning.steps import publish_saved_step
from tuning.sweeps import as_text

PER_PAGE = 20
LOG_BYTES = 16_000  # of the log's end on the page


@require_GET
def run_list(request):
    found = TuningRun.objects.visible_to(request.user).select_related(
        "owner", "checkpoint", "dataset_version__dataset"
    )
    page = Paginator(found, PER_PAGE).get_page(request.GET.get("page"))
    live = 3 if any(run.is_active for run in page) else None
    return render(request, "tuning/tuningrun_list.html", {"page": page, "page_is_live": live})


@require_GET
def detail(request, pk):
    found = TuningRun.objects.select_related("owner", "checkpoint", "dataset_version__dataset")
    run = get_visible(found, request.user, pk=pk)
    wanted = [whole_number(text) for text in request.GET.getlist("with")][:MOST_CURVES]
    visible = found.visible_to(request.user).exclude(pk=pk)
    others = list(visible.filter(pk__in=[number for number in wanted if number is not None]))
    shown, newest = chart(run, others), run.metrics.last()
    made = run.made_checkpoint
    context = {
        "run": run,
        "mine": TuningRun.objects.changeable_by(request.user).filter(pk=pk).exists(),
        "adapters": [
            (
                adapter,
                adapter.evaluation_runs.visible_to(request.user).filter(
                    status=Run.Status.SUCCEEDED
                )[:3],
            )
            for adapter in run.adapters.visible_to(request.user)
        ],
        "made_checkpoint": made,
        "checkpoint_evaluations": made.evaluation_runs.visible_to(request.user).filter(
            adapter=None, status=Run.Status.SUCCEEDED
        )[:3]
        if made
        else (),
        "hyper": _hyper(run, others),
        "others": others,
        "comparable": visible.filter(loss__isnull=False).exclude(pk__in=[o.pk for o in others])[
            :20
        ],
        "saved_steps": run.saved_steps(),
        "chart": shown,
        "first": shown["points"][0] if shown["points"] else None,
        "learning_rate": f"{newest.learning_rate:.2e}" if newest else "—",
        "schedule": as_shown("lr_scheduler_type", run.recipe.get("lr_scheduler_type")),
        "variants": _variants(run),
        "beside": Adapter.objects.visible_to(request.user).filter(
            checkpoint=run.checkpoint, sha256__in=run.recipe.get("beside", "").split(",")
        )
        if run.recipe.get("beside")
        else (),
        "log": run.log_tail(LOG_BYTES),
        "page_is_live": 2 if run.is_active else None,
    }
    return render(request, "tuning/tuningrun_detail.html", context)


def _hyper(run: TuningRun, others: list[TuningRun]) -> list[tuple]:
    """(label, name, value, [(another run, its value) where that differs]) of each
    hyper-parameter; LoRA's only where one of the runs has that method.
    """
    methods = {each.recipe.get("method") for each in (run, *others)}
    unread = () if LORA in methods else OF_LORA
    theirs = [(other, Recipe.from_dict(other.recipe).as_dict()) for other in others]
    found = []
    for name, label in LABELS.items():
        if name in run.recipe and name not in unread:
            value = run.recipe[name]
            differing = [
                (other, as_shown(name, recipe[name]))
                for other, recipe in theirs
                if recipe[name] != value
            ]
            found.append((label, name, as_shown(name, value), differing))
    return found


def _variants(run: TuningRun) -> list[dict]:
    """Of a sweep: what each changes, and once it has ended what became of it."""
    adapters = {adapter.pk: adapter for adapter in run.adapters.all()}
    ended = run.variants or [{} for _ in run.recipe.get("sweep") or ()]
    return [
        {**one, "label": variant_label(run, number), "adapter": adapters.get(one.get("adapter"))}
        for number, one in enumerate(ended)
    ]


def new_run(request):
    """`?dataset=`, `?like=RUN` (the recipe of an earlier run) and `?preset=` fill the form in."""
    user = request.user
    presets = {name: preset.as_dict() for name, preset in PRESETS.items()}
    if request.method == "POST":
        form = TuningRunForm(request.POST, user=user)
        if form.is_valid():
            fields = form.cleaned_data
            try:
                run = once_per_form(
                    request,
                    lambda: create_run(
                        user,
                        dataset=fields["dataset"],
                        checkpoint=fields["checkpoint"],
                        name=fields["name"],
                        sweep=fields["sweep"],
                        **form.hyper(),
                    ),
                )
            except ValidationError as error:
                add_errors(form, error)
            else:
                return redirect("tuning_run", pk=run.pk)
    else:
        form = TuningRunForm(initial=_initial(request, presets), user=user)
    context = {
        "form": form,
        "chosen_preset": form["preset"].value(),
        "page_data": {
            "presets": presets,
            "chatglm": [
                row.pk for row in form.fields["checkpoint"].queryset if row.family.can_quantize
            ],
            "checkpoints": {row.pk: row.name for row in form.fields["checkpoint"].queryset},
            "url": request.build_absolute_uri("/api/v1/tuning-runs/"),
            "measured": measured(user),
        },
        "waiting": Run.objects.filter(status__in=Run.ACTIVE).count(),
    }
    return render(request, "tuning/tuningrun_form.html", context)


def _initial(request, presets: dict) -> dict:
    checkpoint = Checkpoint.objects.visible_to(request.user).first()
    dataset = Dataset.objects.visible_to(request.user)
    wanted = dataset.filter(pk=whole_number(request.GET.get("dataset"))).first()
    initial = {
        "dataset": wanted or dataset.first(),
        "checkpoint": checkpoint,
        "preset": request.GET.get("preset", ""),
    }
    earlier = (
        TuningRun.objects.visible_to(request.user)
        .filter(pk=whole_number(request.GET.get("like")))
        .first()
    )
    if earlier:
        initial |= {
            "checkpoint": earlier.checkpoint,
            "dataset": wanted or earlier.dataset_version.dataset,
            "preset": "",
        }
        initial["sweep"] = as_text(earlier.recipe.get("sweep") or ())
        return initial | {name: earlier.recipe.get(name) for name in LABELS}
    if initial["preset"] not in presets:
        initial["preset"] = recommended_preset(checkpoint) if checkpoint else next(iter(presets))
    values = dict(presets[initial["preset"]])
    if not (checkpoint and checkpoint.family.can_quantize):
        values["quantization_bit"] = None  # of the presets' base alone
    return initial | values


@require_POST
def publish_step(request, pk, step):
    """A step that was saved on the way becomes a tuned model of its own, to be talked to."""
    run = get_visible(TuningRun.objects.changeable_by(request.user), request.user, pk=pk)
    try:
        adapter = publish_saved_step(run, step)
    except ValidationError as refused:
        messages.warning(request, refused.message)
        return redirect("tuning_run", pk=pk)
    return redirect(f"{reverse('chat')}?adapter={adapter.pk}")


@require_POST
def together(request, pk, other):
    """The run's adapter with one that it was trained beside, to be talked to."""
    run = get_visible(TuningRun.objects, request.user, pk=pk)
    front = get_visible(Adapter.objects, request.user, pk=other)
    made = run.adapters.visible_to(request.user).filter(pk=getattr(run.result(), "pk", None))
    try:
        adapter = composed(request.user, front, get_object_or_404(made))
    except ValidationError as refused:
        messages.warning(request, refused.message)
        return redirect("tuning_run", pk=pk)
    return redirect(f"{reverse('chat')}?adapter={adapter.pk}")


@require_GET
def recipe_file(request, pk):
    """The frozen recipe, to be kept, or sent to the REST API elsewhere."""
    run = get_visible(TuningRun.objects, request.user, pk=pk)
    response = JsonResponse(run.recipe, json_dumps_params={"ensure_ascii": False, "indent": 2})
    disposition = content_disposition_header(True, f"recipe-{run.pk}.json")
    response["Content-Disposition"] = disposition
    return response


@require_POST
def cancel(request, pk):
    run = get_visible(TuningRun.objects.changeable_by(request.user), request.user, pk=pk)
    lifecycle.cancel(run)
    messages.success(request, _("The run stops after its current step."))
    return redirect("tuning_run", pk=pk)


@require_POST
def resume(request, pk):
    run = get_visible(TuningRun.objects.changeable_by(request.user), request.user, pk=pk)
    try:
        resumed = lifecycle.resume(run)
    except ValidationError as refused:
        messages.warning(request, refused.message)
        return redirect("tuning_run", pk=pk)
    if resumed:
        messages.success(request, _("The run goes on from what it has saved."))
    else:
        messages.warning(request, _("Only a failed or cancelled run can go on."))
    return redirect("tuning_run", pk=pk)
