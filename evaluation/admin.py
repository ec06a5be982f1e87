"""Evaluations in Django's admin, for a reviewer: base beside tuned for every metric, and the
predictions page by page.
"""

from django.contrib import admin
from django.core.paginator import Paginator
from django.db.models import IntegerField
from django.db.models.fields.json import KT
from django.db.models.functions import Cast
from django.http import HttpResponseRedirect
from django.urls import reverse
from django.utils.formats import date_format
from django.utils.html import format_html
from django.utils.timezone import localtime
from django.utils.translation import gettext_lazy as _

from evaluation.comparison import MOST
from evaluation.metrics import METRICS
from evaluation.models import EvaluationRun
from evaluation.reviewing import may_review
from evaluation.verdicts import interval, overall, said
from portal.admin import RunAdmin
from portal.templatetags.portal import person
from tuning.admin import ReadOnly

PREDICTIONS_PER_PAGE = 20
NOTHING = "–"


def _score(scores: dict | None, metric: str) -> str:
    return said(scores[metric]["value"]) if scores and metric in scores else NOTHING


def _difference(run: EvaluationRun, metric: str) -> str:
    """+12.30 [+10.10, +14.50]: the tuned model's gain and its 95 % interval."""
    told = (run.difference or {}).get(metric)
    if not told:
        return NOTHING
    if told["low"] is None:
        return f"{said(told['value'], signed=True)} ({interval(told)})"
    ends = ", ".join(said(told[end], signed=True) for end in ("low", "high"))
    return f"{said(told['value'], signed=True)} [{ends}]"


def _metric_column(metric: str):
    @admin.display(description=metric.upper())
    def column(self, run):
        if run.adapter_name is None:
            return _score(run.scores, metric)
        base = _score(run.baseline.scores if run.baseline else None, metric)
        return format_html(
            '{} → <strong>{}</strong><br><small class="delta">{}</small>',
            base,
            _score(run.scores, metric),
            _difference(run, metric),
        )

    return column


@admin.register(EvaluationRun)
class EvaluationRunAdmin(ReadOnly, RunAdmin):
    list_display = [
        "id",
        "name",
        "status",
        "verdict",
        *METRICS,
        "kept",
        "reviewed",
        "dataset",
        "answered_by",
        "predictions_link",
        "begun",
    ]
    list_display_links = ["id", "name"]
    list_filter = ["status", "review", "decoding", "checkpoint", "owner"]
    actions = ["compare", *RunAdmin.actions]
    list_select_related = ["owner", "checkpoint", "adapter", "baseline", "dataset_version__dataset"]
    search_fields = ["name", "owner__username", "dataset_version__dataset__name", "adapter__name"]
    date_hierarchy = "created_at"
    fields = [
        "name",
        "owner",
        "status",
        "phase",
        "rows",
        "failed_rows",
        "dataset",
        "split",
        "checkpoint",
        "adapter_name",
        "decoding",
        *METRICS,
        "intervals",
        "verdict",
        "kept",
        "reviewed",
        "review_note",
        "reviewed_by",
        "reviewed_at",
        "baseline",
        "recipe_lines",
        "error_line",
        "attempt",
        "created_at",
        "started_at",
        "finished_at",
    ]
    readonly_fields = fields

    @admin.display(description=_("dataset"), ordering="dataset_version__dataset__name")
    def dataset(self, run):
        return str(run.dataset_version)

    @admin.display(description=_("adapter"), empty_value=_("none: base"), ordering="adapter__name")
    def adapter_name(self, run):
        return run.adapter_name

    @admin.display(description=_("rows"), ordering="progress")
    def rows(self, run):
        return f"{run.progress} / {run.total}"

    @admin.display(description=_("predictions"))
    def predictions_link(self, run):
        address = reverse("admin:evaluation_evaluationrun_change", args=[run.pk])
        return format_html('<a href="{}#predictions">{}</a>', address, self.rows(run))

    @admin.display(description=_("created"), ordering="created_at")
    def begun(self, run):
        """Who, and when."""
        return format_html(
            '{}<br><small class="nowrap">{}</small>',
            person(run.owner),
            date_format(localtime(run.created_at), "SHORT_DATETIME_FORMAT"),
        )

    @admin.display(description=_("model"), ordering="checkpoint__name")
    def answered_by(self, run):
        """The adapter over its checkpoint; the bare checkpoint alone."""
        if run.adapter_name is None:
            return run.checkpoint.name
        return format_html("{}<br><small>{}</small>", run.adapter_name, run.checkpoint.name)

    @admin.display(description=_("intervals of 95 %"))
    def intervals(self, run):
        if not run.scores:
            return NOTHING
        return "; ".join(
            f"{metric.upper()} {interval(run.scores[metric])}"
            for metric in METRICS
            if metric in run.scores
        )

    @admin.display(description=_("verdict"))
    def verdict(self, run):
        found = overall(run.difference)
        if found is None:
            return NOTHING
        return format_html(
            '<span class="verdict" data-tone="{}" title="{}">{}</span>',
            found["tone"],
            found["sentence"],
            found["label"],
        )

    @admin.display(description=_("kept"))
    def kept(self, run):
        """Of what the base knew; the answers themselves are not read for a list."""
        if not run.general_knew:
            return NOTHING
        return f"{round(100 * run.general_kept / run.general_knew)} %"

    @admin.display(description=_("review"), ordering="review")
    def reviewed(self, run):
        address = reverse("evaluation_run", args=[run.pk])
        return format_html('<a href="{}#review">{}</a>', address, run.get_review_display())

    @admin.action(description=_("Compare the selected evaluations"))
    def compare(self, request, queryset):
        numbers = list(queryset.order_by("pk").values_list("pk", flat=True)[: MOST + 1])
        query = "&".join(f"run={number}" for number in numbers)
        return HttpResponseRedirect(f"{reverse('evaluation_compare')}?{query}")

    def get_queryset(self, request):
        return (
            super()
            .get_queryset(request)
            .defer("general", "baseline__general")
            .annotate(
                general_kept=Cast(KT("general__kept"), IntegerField()),
                general_knew=Cast(KT("general__base_right"), IntegerField()),
            )
        )

    def change_view(self, request, object_id, form_url="", extra_context=None):
        run = self.get_object(request, object_id)
        page = None
        if run is not None:
            found = Paginator(run.predictions.all(), PREDICTIONS_PER_PAGE)
            page = found.get_page(request.GET.get("page"))
            beside = _baseline_texts(run, page)
            for prediction in page:
                prediction.base_text = beside.get(prediction.row)
        return super().change_view(
            request,
            object_id,
            form_url,
            {
                **(extra_context or {}),
                "predictions": page,
                "metrics": METRICS,
                "may_review": may_review(request.user),
            },
        )


for _metric in METRICS:  # columns are looked up by name
    setattr(EvaluationRunAdmin, _metric, _metric_column(_metric))


def _baseline_texts(run: EvaluationRun, page) -> dict[int, str]:
    if run.baseline is None:
        return {}
    rows = [prediction.row for prediction in page]
    return dict(run.baseline.predictions.filter(row__in=rows).values_list("row", "text"))
