"""Telling somebody something: the function that everything else calls."""

from __future__ import annotations

from django.conf import settings
from django.db import IntegrityError, transaction
from django.utils import timezone

from portal.models import Run
from portal.notices import delivery
from portal.notices.models import Delivery, Notice, NoticeSettings

KEPT = 200  # notices of one person; the oldest go


def notify(user, kind: str, text: str, url: str = "", *, key: str = "") -> Notice | None:
    """A notice in the portal, in the caller's transaction; e-mail and webhook follow once that is
    committed. kind: portal/notices/models.py has sentences for some. url: a path of this portal.
    key: what it is about; None where the user was told that already.
    """
    named = {"key": key} if key else {}
    try:
        with transaction.atomic():
            notice = Notice.objects.create(
                user=user, kind=kind, text=text[:500], url=url[:300], **named
            )
    except IntegrityError:
        return None
    wanted = NoticeSettings.objects.filter(user=user).first()
    if wanted is not None:
        if wanted.by_email and settings.EMAIL_HOST and user.email:
            _send(notice, Delivery.Channel.EMAIL)
        if wanted.webhook_url:
            _send(notice, Delivery.Channel.WEBHOOK)
    old = Notice.objects.filter(user=user).order_by("-id").values_list("id", flat=True)[KEPT:]
    Notice.objects.filter(pk__in=list(old)).delete()
    return notice


def _send(notice: Notice, channel: str) -> None:
    made = Delivery.objects.create(notice=notice, channel=channel)
    transaction.on_commit(lambda: delivery.ring(made.pk))


def run_ended(run_id: int) -> None:
    """Tells the owner how a run ended, in the transaction that ends it: so once, whenever its
    process is killed.
    """
    run = Run.objects.select_related("owner").get(pk=run_id)
    url = run.get_absolute_url()
    notify(run.owner, f"run_{run.status}", run.name, url, key=f"run:{run.pk}:{run.token}")


def read_all(user) -> None:
    Notice.objects.filter(user=user, read_at=None).update(read_at=timezone.now())
