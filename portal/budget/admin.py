"""Grants, the ledger and who used what in Django's admin. A grant is given here, and withdrawn by
an action; everything else is to look at.
"""

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from portal.budget import grants, pricing
from portal.budget.models import DeviceUse, Entry, Grant, Transaction
from portal.models import Team, TokenUsage, User


class ReadOnly:
    """Mixin: rows are shown, not edited."""

    show_full_result_count = False

    def has_add_permission(self, request, obj=None):
        return False

    def has_change_permission(self, request, obj=None):
        return False

    def has_delete_permission(self, request, obj=None):
        return False


class GrantForm(forms.ModelForm):
    user = forms.ModelChoiceField(
        User.objects.filter(is_active=True), required=False, label=_("User")
    )
    team = forms.ModelChoiceField(Team.objects.all(), required=False, label=_("Team"))
    units = forms.IntegerField(
        label=_("Units"),
        help_text=_(
            "Whole ones. Without PORTAL_DEVICE_RATE or PORTAL_TOKEN_RATE nothing costs any."
        ),
    )

    class Meta:
        model = Grant
        fields = ["user", "team", "units", "expires_at", "note"]

    def clean(self):
        told = super().clean()
        if bool(told.get("user")) == bool(told.get("team")):
            self.add_error("user", ValidationError(_("Name a user or a team."), "required"))
        for field, check in (
            ("units", grants.checked_units),
            ("expires_at", grants.checked_expiry),
        ):
            try:
                if told.get(field) is not None:
                    check(told[field])
            except ValidationError as problem:
                self.add_error(field, problem)
        return told


@admin.register(Grant)
class GrantAdmin(admin.ModelAdmin):
    form = GrantForm
    list_display = [
        "id",
        "holder",
        "units",
        "units_left",
        "units_held",
        "expires_at",
        "closed_at",
        "by",
        "note",
    ]
    list_display_links = None
    list_select_related = ["account", "by"]
    list_filter = ["account__user", "account__team"]
    search_fields = ["account__name", "note"]
    date_hierarchy = "expires_at"
    actions = ["withdraw"]

    @admin.display(description=_("holder"))
    def holder(self, grant):
        return grant.account.name

    @admin.display(description=_("units"))
    def units(self, grant):
        return pricing.in_words(grant.amount)

    @admin.display(description=_("left"))
    def units_left(self, grant):
        return pricing.in_words(grant.left)

    @admin.display(description=_("held"))
    def units_held(self, grant):
        return pricing.in_words(grant.held)

    def has_change_permission(self, request, obj=None):
        return False

    def has_delete_permission(self, request, obj=None):
        return False

    def has_withdraw_permission(self, request):
        return self.has_add_permission(request)

    def save_model(self, request, obj, form, change):
        told = form.cleaned_data
        holder = told["user"] or told["team"]
        made = grants.give(request.user, holder, told["units"], told["expires_at"], told["note"])
        obj.__dict__.update(made.__dict__)

    def log_addition(self, request, object, message):
        """The rules have noted it, with figures (portal/budget/grants.py)."""

    @admin.action(description=_("Withdraw the selected grants"), permissions=["withdraw"])
    def withdraw(self, request, queryset):
        done = sum(grants.withdraw(request.user, grant) for grant in queryset)
        told = ngettext(
            "%(count)s grant has been withdrawn.", "%(count)s grants have been withdrawn.", done
        )
        self.message_user(request, told % {"count": done}, messages.SUCCESS)


class EntryInline(ReadOnly, admin.TabularInline):
    model = Entry
    fields = readonly_fields = ["account", "grant", "units"]
    extra = 0

    def get_queryset(self, request):
        return super().get_queryset(request).select_related("account", "grant__account")

    @admin.display(description=_("units"))
    def units(self, entry):
        return f"{pricing.units(entry.amount):+,.6f}"


@admin.register(Transaction)
class LedgerAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["id", "at", "kind", "holder", "units", "about", "by"]
    list_filter = ["kind", "at"]
    list_select_related = ["by"]
    search_fields = ["about", "entries__account__name"]
    date_hierarchy = "at"
    inlines = [EntryInline]
    fields = readonly_fields = ["kind", "at", "by", "about", "reverses"]
    actions = ["refund"]

    def get_queryset(self, request):
        return super().get_queryset(request).prefetch_related("entries__account")

    @admin.display(description=_("holder"))
    def holder(self, transaction):
        names = (entry.account.name for entry in transaction.entries.all())
        return ", ".join(dict.fromkeys(filter(None, names)))

    @admin.display(description=_("units"))
    def units(self, transaction):
        """As much as moved."""
        moved = sum(entry.amount for entry in transaction.entries.all() if entry.amount > 0)
        return pricing.in_words(moved)

    def has_refund_permission(self, request):
        return request.user.has_perm("budget.add_grant")

    @admin.action(description=_("Refund what the selected ones have used"), permissions=["refund"])
    def refund(self, request, queryset):
        done = sum(grants.refund(request.user, spent) for spent in queryset)
        told = ngettext(
            "%(count)s transaction has been refunded.",
            "%(count)s transactions have been refunded.",
            done,
        )
        self.message_user(request, told % {"count": done}, messages.SUCCESS)


@admin.register(TokenUsage)
class TokenUsageAdmin(ReadOnly, admin.ModelAdmin):
    list_display = [
        "day",
        "user",
        "door",
        "model",
        "answers",
        "prompt_tokens",
        "completion_tokens",
    ]
    list_display_links = None
    list_filter = ["door", "user__teams", "user"]
    list_select_related = ["user"]
    search_fields = ["user__username", "model"]
    date_hierarchy = "day"


@admin.register(DeviceUse)
class DeviceUseAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["day", "user", "kind", "model", "minutes", "run"]
    list_display_links = None
    list_filter = ["kind", "user__teams", "user"]
    list_select_related = ["user", "run"]
    search_fields = ["user__username", "model"]
    date_hierarchy = "day"

    @admin.display(description=_("minutes"), ordering="milliseconds")
    def minutes(self, use):
        return f"{use.milliseconds / 60_000:.1f}"
