"""The list behind the bell, and what somebody wants to be told elsewhere."""

from django import forms
from django.conf import settings
from django.contrib import messages
from django.core.paginator import Paginator
from django.shortcuts import redirect, render
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy
from django.views.decorators.http import require_GET, require_POST

from portal.forms import Styled
from portal.notices import webhook
from portal.notices.models import Notice, NoticeSettings, new_secret
from portal.notices.notify import read_all

PER_PAGE = 30


class NoticeForm(Styled, forms.ModelForm):
    class Meta:
        model = NoticeSettings
        fields = ["by_email", "webhook_url"]
        labels = {
            "by_email": gettext_lazy("By e-mail"),
            "webhook_url": gettext_lazy("Webhook: an address that is sent a signed POST"),
        }

    def clean_webhook_url(self):
        url = self.cleaned_data["webhook_url"].strip()
        if url:
            try:
                webhook.check(url)
            except webhook.NotAllowed as refused:
                raise forms.ValidationError(str(refused)) from refused
        return url


def form_of(user, data=None) -> NoticeForm:
    mine = NoticeSettings.objects.filter(user=user).first() or NoticeSettings(user=user)
    return NoticeForm(data, instance=mine)


def account_context(user) -> dict:
    """What the account's page shows of it."""
    return {
        "notice_form": form_of(user),
        "email_possible": bool(settings.EMAIL_HOST and user.email),
        "webhooks_possible": bool(settings.WEBHOOK_HOSTS or settings.WEBHOOK_NETWORKS),
    }


@require_GET
def notices(request):
    """Opening the list is reading it."""
    page = Paginator(Notice.objects.filter(user=request.user), PER_PAGE).get_page(
        request.GET.get("page")
    )
    shown = list(page.object_list)
    page.object_list = shown
    read_all(request.user)
    return render(request, "portal/notices.html", {"page": page})


@require_POST
def change_settings(request):
    """`action` new_secret draws another secret; else the form is saved."""
    form = form_of(request.user, request.POST)
    if request.POST.get("action") == "new_secret":
        mine = form_of(request.user).instance
        mine.webhook_secret = new_secret()
        mine.save()
        messages.success(request, _("The webhook has a new secret."))
    elif form.is_valid():
        form.save()
        messages.success(request, _("Saved."))
    else:
        for errors in form.errors.values():
            messages.warning(request, " ".join(errors))
    return redirect("account")
