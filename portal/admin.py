"""Members and their keys in Django's admin. Runs are listed by the apps that own them."""

from django.contrib import admin
from django.contrib.auth.admin import UserAdmin
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from portal.models import ApiKey, User

admin.site.site_header = admin.site.site_title = _("Model portal")
admin.site.index_title = _("Administration")
admin.site.register(User, UserAdmin)


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
