"""Members and their keys in Django's admin. Runs are listed by the apps that own them."""

from django.contrib import admin, messages
from django.contrib.admin.models import LogEntry
from django.contrib.auth.admin import UserAdmin
from django.utils import timezone
from django.utils.html import format_html_join
from django.utils.safestring import mark_safe
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext
from django_q import admin as _queue_pages  # noqa: F401 - registered before they are unregistered
from django_q.models import Failure, OrmQ, Schedule, Success

from portal.login import AdminLoginForm
from portal.models import ApiKey, ExternalLogin, Team, User
from portal.runs import lifecycle

admin.site.site_header = admin.site.site_title = _("Model portal")
admin.site.index_title = _("Administration")
admin.site.enable_nav_sidebar = False  # the lists need its width, and the index shows the same
admin.site.login_form = AdminLoginForm
# who adds a schedule names a function to be called
for model in (Schedule, OrmQ, Success, Failure):
    if admin.site.is_registered(model):  # OrmQ only where the database is the broker
        admin.site.unregister(model)


class ExternalLogins(admin.TabularInline):
    """To look at, and to take away: the next login is then a stranger's again."""

    model = ExternalLogin
    extra = 0
    readonly_fields = ["issuer", "subject", "created_at"]

    def has_add_permission(self, request, obj=None):
        return False


@admin.register(User)
class MemberAdmin(UserAdmin):
    inlines = [ExternalLogins]
    list_display = ["username", "is_staff", "is_reviewer", "is_active", "last_login"]
    list_filter = ["is_staff", "is_reviewer", "is_active", "teams"]

    def get_fieldsets(self, request, obj=None):
        """Django's, with the reviewer beside the other rights."""
        found = super().get_fieldsets(request, obj)
        if obj is None:  # a new one gets name and password alone
            return found
        return [
            (title, {**options, "fields": _beside_staff(options["fields"])})
            for title, options in found
        ]


def _beside_staff(fields) -> list[str]:
    return [
        each
        for name in fields
        for each in ((name, "is_reviewer") if name == "is_staff" else (name,))
    ]


@admin.register(Team)
class TeamAdmin(admin.ModelAdmin):
    filter_horizontal = ["members"]
    search_fields = ["name", "members__username"]


@admin.register(LogEntry)
class AuditLogAdmin(admin.ModelAdmin):
    """Who did or decided what, and when (portal/audit.py); to look at."""

    list_display = ["action_time", "user", "content_type", "object_repr", "change"]
    list_display_links = None
    list_filter = ["user", "content_type"]
    list_select_related = ["user", "content_type"]
    search_fields = ["object_repr", "change_message", "user__username"]
    date_hierarchy = "action_time"
    show_full_result_count = False

    @admin.display(description=_("change"))
    def change(self, entry):
        return entry.get_change_message() or entry.get_action_flag_display()

    def has_add_permission(self, request):
        return False

    def has_change_permission(self, request, obj=None):
        return False

    def has_delete_permission(self, request, obj=None):
        return False


@admin.register(ApiKey)
class ApiKeyAdmin(admin.ModelAdmin):
    list_display = ["prefix", "name", "owner", "created_at", "last_used_at", "revoked_at"]
    list_filter = ["owner"]
    search_fields = ["prefix", "name", "owner__username"]
    readonly_fields = ["prefix", "name", "owner", "created_at", "last_used_at", "revoked_at"]
    actions = ["revoke"]

    def has_add_permission(self, request):
        return False  # a key is shown once, to its owner: account page or create_api_key

    @admin.action(description=_("Revoke the selected keys"))
    def revoke(self, request, queryset):
        queryset.filter(revoked_at=None).update(revoked_at=timezone.now())


def as_lines(values: dict):
    """A JSON object for people: one line a value."""
    return format_html_join(mark_safe("<br>"), "{}: {}", values.items())


class RunAdmin(admin.ModelAdmin):
    """What every kind of run has in common: how long it took, and the two things an admin does to
    it.
    """

    actions = ["cancel", "resume"]
    show_full_result_count = False  # of thousands of runs
    list_per_page = 50

    @admin.display(description=_("recipe"))
    def recipe_lines(self, run):
        return as_lines(run.recipe)

    @admin.display(description=_("error"))
    def error_line(self, run):
        return f"{run.error['code']}: {run.error['message']}" if run.error else "–"

    @admin.display(description=_("duration"))
    def took(self, run):
        if run.seconds is None:
            return "–"
        minutes, seconds = divmod(round(run.seconds), 60)
        return f"{minutes}:{seconds:02d}"

    def has_cancel_permission(self, request):
        return request.user.has_perm(f"{self.opts.app_label}.change_{self.opts.model_name}")

    @admin.action(description=_("Cancel the selected runs"), permissions=["cancel"])
    def cancel(self, request, queryset):
        active = [run for run in queryset if run.is_active]
        for run in active:
            lifecycle.cancel(run)
        done = ngettext(
            "%(count)s run is asked to stop.", "%(count)s runs are asked to stop.", len(active)
        )
        self.message_user(request, done % {"count": len(active)}, messages.SUCCESS)

    @admin.action(
        description=_("Resume the selected failed or cancelled runs"), permissions=["cancel"]
    )
    def resume(self, request, queryset):
        resumed = sum(lifecycle.resume(run) for run in queryset)
        done = ngettext(
            "%(count)s run is queued again.", "%(count)s runs are queued again.", resumed
        )
        self.message_user(request, done % {"count": resumed}, messages.SUCCESS)
