"""Evaluations in Django's admin, for a reviewer: base beside tuned for every metric, and the
predictions page by page.
"""

from django.contrib import admin
from django.core.paginator import Paginator
from django.urls import reverse
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from evaluation.intervals import METRICS
from evaluation.models import EvaluationRun
from portal.admin import RunAdmin
from tuning.admin import ReadOnly

PREDICTIONS_PER_PAGE = 20
NOTHING = "–"


def _score(scores: dict | None, metric: str) -> str:
    return f"{scores[metric]['value']:.2f}" if scores else NOTHING


def _difference(run: EvaluationRun, metric: str) -> str:
    """+12.30 [+10.10, +14.50]: the tuned model's gain and its 95 % interval."""
    if not run.difference:
        return NOTHING
    told = run.difference[metric]
    return f"{told['value']:+.2f} [{told['low']:+.2f}, {told['high']:+.2f}]"


def _metric_column(metric: str):
    @admin.display(description=metric.upper())
    def column(self, run):
        if run.adapter_name is None:
            return _score(run.scores, metric)
        base = _score(run.baseline.scores if run.baseline else None, metric)
        return format_html(
            "{} → <strong>{}</strong><br><small>{}</small>",
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
        *METRICS,
        "dataset",
        "answered_by",
        "decoding",
        "predictions_link",
        "owner",
        "created_at",
    ]
    list_display_links = ["id", "name"]
    list_filter = ["status", "decoding", "checkpoint", "adapter", "owner"]
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
            f"{metric.upper()} {run.scores[metric]['low']:.2f}–{run.scores[metric]['high']:.2f}"
            for metric in METRICS
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
            {**(extra_context or {}), "predictions": page, "metrics": METRICS},
        )


for _metric in METRICS:  # columns are looked up by name
    setattr(EvaluationRunAdmin, _metric, _metric_column(_metric))


def _baseline_texts(run: EvaluationRun, page) -> dict[int, str]:
    if run.baseline is None:
        return {}
    rows = [prediction.row for prediction in page]
    return dict(run.baseline.predictions.filter(row__in=rows).values_list("row", "text"))
