"""Datasets and tuning runs in Django's admin: to look at, to cancel and to resume. Rows are written
by the portal alone.
"""

from django.contrib import admin
from django.utils.html import format_html_join
from django.utils.safestring import mark_safe
from django.utils.translation import gettext_lazy as _

from portal.admin import RunAdmin
from tuning.models import Dataset, DatasetVersion, TuningRun


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

    @admin.display(description=_("steps"), ordering="progress")
    def steps(self, run):
        return f"{run.progress} / {run.total}"

    @admin.display(description=_("examples per second"))
    def speed(self, run):
        return "–" if run.samples_per_second is None else f"{run.samples_per_second:.1f}"

    @admin.display(description=_("loss"), ordering="loss")
    def last_loss(self, run):
        return "–" if run.loss is None else f"{run.loss:.4f}"
