"""Checkpoints and adapters in Django's admin. Conversations are private, so they are not here."""

from django import forms
from django.contrib import admin, messages
from django.utils.translation import gettext_lazy as _

from chat import registry
from chat.models import Adapter, Checkpoint, FetchRun
from portal.admin import RunAdmin
from portal.rest.conventions import Conflict


class Named(forms.ModelForm):
    """Names are model ids; the rules of registry.check_name hold here too."""

    def clean_name(self):
        longest = self._meta.model._meta.get_field("name").max_length
        return registry.check_name(self.cleaned_data["name"], longest, except_row=self.instance)

    def clean_shared(self):
        shared = self.cleaned_data["shared"]
        if shared and not self.instance.shared:
            registry.check_may_be_shared(self.instance)
        return shared


@admin.register(Checkpoint)
class CheckpointAdmin(admin.ModelAdmin):
    form = Named
    list_display = [
        "name",
        "architecture",
        "parameters",
        "is_default",
        "is_starter",
        "path",
        "created_at",
    ]
    search_fields = ["name", "path"]
    fields = [
        "name",
        "path",
        "fingerprint",
        "description",
        "is_default",
        "is_starter",
        "created_at",
    ]
    readonly_fields = [field for field in fields if field != "name"]
    actions = ["make_default"]

    def has_add_permission(self, request):
        return False  # a folder is checked when it is registered: page, REST or add_checkpoint

    def delete_model(self, request, checkpoint):
        registry.remove_checkpoint(checkpoint)

    def delete_queryset(self, request, queryset):
        for checkpoint in queryset:
            registry.remove_checkpoint(checkpoint)

    @admin.display(description=_("architecture"))
    def architecture(self, checkpoint):
        return checkpoint.description.get("architecture")

    @admin.display(description=_("parameters"))
    def parameters(self, checkpoint):
        count = checkpoint.description.get("parameters")
        return f"{count:,}" if count else None

    @admin.action(description=_("Make the selected checkpoint the default"))
    def make_default(self, request, queryset):
        if queryset.count() != 1:
            self.message_user(request, _("Select exactly one checkpoint."), messages.ERROR)
            return
        registry.make_default(queryset.get(), request.user)
        self.message_user(request, _("The worker serves it as soon as it has loaded it."))


@admin.register(Adapter)
class AdapterAdmin(admin.ModelAdmin):
    form = Named
    list_display = [
        "name",
        "checkpoint",
        "owner",
        "shared",
        "pre_seq_len",
        "step",
        "run",
        "created_at",
    ]
    list_filter = ["checkpoint", "shared", "owner"]
    list_select_related = ["checkpoint", "owner", "run"]
    search_fields = ["name", "owner__username"]
    fields = [
        "name",
        "checkpoint",
        "owner",
        "shared",
        "run",
        "pre_seq_len",
        "step",
        "sha256",
        "folder",
        "created_at",
    ]
    readonly_fields = [field for field in fields if field not in ("name", "shared")]

    def has_add_permission(self, request):
        return False  # made by a tuning run or by import_adapter

    def delete_model(self, request, adapter):
        self.delete_queryset(request, [adapter])

    def delete_queryset(self, request, queryset):
        for adapter in queryset:
            try:
                registry.remove_adapter(adapter)
            except Conflict as error:
                self.message_user(request, f"{adapter}: {error.detail}", messages.ERROR)


@admin.register(FetchRun)
class FetchRunAdmin(RunAdmin):
    list_display = ["__str__", "source", "status", "owner", "checkpoint", "created_at", "took"]
    list_filter = ["status", "owner"]
    list_select_related = ["owner", "checkpoint"]
    search_fields = ["name", "source"]
    fields = [
        "name",
        "source",
        "owner",
        "status",
        "attempt",
        "error_line",
        "recipe_lines",
        "checkpoint",
        "created_at",
        "started_at",
        "finished_at",
        "took",
    ]
    readonly_fields = fields

    def has_add_permission(self, request):
        return False

    def has_delete_permission(self, request, obj=None):
        return False
