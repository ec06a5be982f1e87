"""Datasets and tuning runs in Django's admin: to look at, to cancel and to resume. Rows are written
by the portal alone.
"""

from django.contrib import admin
from django.urls import reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import mark_safe
from django.utils.translation import gettext_lazy as _

from portal.admin import RunAdmin
from tuning.models import Dataset, DatasetVersion, TuningRun

MOST_POINTS = 300  # of a curve


class ReadOnly:
    """Mixin: rows are shown, not edited."""

    def has_add_permission(self, request, obj=None):
        return False

    def has_change_permission(self, request, obj=None):
        return False

    def has_delete_permission(self, request, obj=None):
        return False


class VersionInline(ReadOnly, admin.TabularInline):
    model = DatasetVersion
    fields = readonly_fields = [
        "number",
        "rows_by_split",
        "encoding",
        "source_name",
        "fingerprint",
        "created_at",
    ]
    extra = 0

    @admin.display(description=_("rows"))
    def rows_by_split(self, version):
        return ", ".join(f"{name} {split['rows']:,}" for name, split in version.splits.items())

    @admin.display(description=_("fingerprint"))
    def fingerprint(self, version):
        return version.sha256[:12]


@admin.register(Dataset)
class DatasetAdmin(ReadOnly, admin.ModelAdmin):
    list_display = [
        "id",
        "name",
        "owner",
        "rows",
        "problem_count",
        "created_at",
        "deleted_at",
    ]
    list_display_links = ["id", "name"]
    list_filter = ["owner"]
    list_select_related = ["owner"]
    search_fields = ["name", "owner__username"]
    inlines = [VersionInline]
    fields = [
        "name",
        "owner",
        "prompt_column",
        "response_column",
        "history_column",
        "problem_lines",
        "created_at",
    ]

    def get_queryset(self, request):
        return super().get_queryset(request).prefetch_related("versions")

    @admin.display(description=_("rows"))
    def rows(self, dataset):
        version = next(iter(dataset.versions.all()), None)
        return version.rows if version else 0

    @admin.display(description=_("problems"))
    def problem_lines(self, dataset):
        found = ((problem["line"], problem["message"]) for problem in dataset.problems)
        return format_html_join(mark_safe("<br>"), "{}: {}", found) or "–"

    @admin.display(description=_("problems"))
    def problem_count(self, dataset):
        return dataset.problem_count


@admin.register(TuningRun)
class TuningRunAdmin(ReadOnly, RunAdmin):
    list_display = [
        "id",
        "name",
        "status",
        "owner",
        "checkpoint",
        "dataset",
        "steps",
        "last_loss",
        "attempt",
        "created_at",
        "took",
    ]
    list_display_links = ["id", "name"]
    list_filter = ["status", "owner", "checkpoint"]
    list_select_related = ["owner", "checkpoint", "dataset_version__dataset"]
    search_fields = ["name", "owner__username", "dataset_version__dataset__name"]
    date_hierarchy = "created_at"
    fields = [
        "name",
        "owner",
        "status",
        "phase",
        "steps",
        "last_loss",
        "curve",
        "speed",
        "trainable_parameters",
        "checkpoint",
        "dataset",
        "recipe_lines",
        "error_line",
        "attempt",
        "created_at",
        "started_at",
        "finished_at",
        "took",
    ]

    @admin.display(description=_("dataset"), ordering="dataset_version__dataset__name")
    def dataset(self, run):
        return str(run.dataset_version)

    @admin.display(description=_("loss curve"))
    def curve(self, run):
        """Drawn from the logged steps, MOST_POINTS of them; the portal's own page has it live."""
        points = list(run.metrics.values_list("step", "loss"))
        if len(points) < 2:
            return "–"
        points = points[:: max(1, len(points) // MOST_POINTS)]
        highest, lowest = max(loss for _step, loss in points), min(loss for _step, loss in points)
        first, last = points[0][0], points[-1][0]
        tall = highest - lowest or 1.0
        line = " ".join(
            f"{1000 * (step - first) / (last - first):.1f},{100 - 100 * (loss - lowest) / tall:.1f}"
            for step, loss in points
        )
        return format_html(
            '<svg class="loss-line" viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" '
            'aria-label="{} → {}"><polyline points="{}"/></svg>'
            '<span class="delta">{} – {}: {} – {}</span> <a href="{}">{}</a>',
            f"{points[0][1]:.4f}",
            f"{points[-1][1]:.4f}",
            line,
            first,
            last,
            f"{lowest:.4f}",
            f"{highest:.4f}",
            reverse("tuning_run", args=[run.pk]),
            _("Charts, log and model"),
        )

    @admin.display(description=_("steps"), ordering="progress")
    def steps(self, run):
        return f"{run.progress} / {run.total}"

    @admin.display(description=_("examples per second"))
    def speed(self, run):
        return "–" if run.samples_per_second is None else f"{run.samples_per_second:.1f}"

    @admin.display(description=_("loss"), ordering="loss")
    def last_loss(self, run):
        return "–" if run.loss is None else f"{run.loss:.4f}"
