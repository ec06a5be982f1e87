"""Notices on their way out: by e-mail and webhook, in the queue's processes. As with runs the queue
is a doorbell and the row the truth: an attempt is claimed by one conditional UPDATE, a lost bell is
rung again by the supervisor.
"""

from __future__ import annotations

import json
import logging
from datetime import timedelta

from django.conf import settings
from django.core.mail import send_mail
from django.utils import timezone
from django.utils.translation import gettext as _
from django_q.tasks import async_task
from redis import RedisError

from portal.notices import webhook
from portal.notices.models import Delivery, Notice

logger = logging.getLogger(__name__)

# after the first, second and third attempt that failed; then it is given up
PAUSES = (timedelta(seconds=30), timedelta(minutes=5), timedelta(hours=1))
DELIVER = "portal.notices.delivery.deliver"  # what django-q2 calls


def ring(delivery_id: int) -> None:
    try:
        async_task(DELIVER, delivery_id, cluster="default", task_name=f"notice-{delivery_id}")
    except RedisError as error:
        logger.warning("delivery %s waits, the queue could not be told: %s", delivery_id, error)


def ring_due() -> None:
    """Called by the supervisor every few seconds."""
    now = timezone.now()
    waiting = Delivery.objects.filter(done_at=None)
    # from before the clock was set back
    waiting.filter(next_at__gt=now + 2 * PAUSES[-1]).update(next_at=now)
    due = waiting.filter(next_at__lt=now - timedelta(seconds=10))
    for delivery_id in list(due.values_list("id", flat=True)[:100]):
        waiting.filter(pk=delivery_id).update(next_at=now)
        ring(delivery_id)


def deliver(delivery_id: int) -> str:
    """One attempt, unless another process has begun it."""
    sending = Delivery.objects.select_related("notice__user").filter(pk=delivery_id).first()
    if sending is None or sending.done_at is not None:
        return "nothing to do"
    now = timezone.now()
    last = sending.attempts >= len(PAUSES)
    pause = PAUSES[min(sending.attempts, len(PAUSES) - 1)]
    mine = Delivery.objects.filter(
        pk=delivery_id, done_at=None, attempts=sending.attempts, next_at__lte=now
    )
    if not mine.update(attempts=sending.attempts + 1, next_at=now + pause):
        return "somebody else does it"
    rows = Delivery.objects.filter(pk=delivery_id)
    if sending.attempts > len(PAUSES):  # every attempt was killed
        rows.update(done_at=now)
        return "given up"
    try:
        if sending.channel == Delivery.Channel.EMAIL:
            _email(sending.notice)
        else:
            _webhook(sending.notice)
    except Exception as fault:  # whatever a mail server or a receiver does
        logger.warning("delivery %s (%s) failed: %s", delivery_id, sending.channel, fault)
        final = last or isinstance(fault, webhook.NotAllowed)
        rows.update(error=str(fault)[:300], done_at=timezone.now() if final else None)
        return "failed"
    rows.update(done_at=timezone.now(), error="")
    return "sent"


def _address(notice: Notice) -> str:
    origin = (settings.CSRF_TRUSTED_ORIGINS or [""])[0]
    return f"{origin}{notice.url}" if notice.url else origin


def _email(notice: Notice) -> None:
    send_mail(
        " ".join(notice.sentence.split()),  # a header is one line
        "\n\n".join(part for part in (notice.sentence, _address(notice)) if part),
        settings.DEFAULT_FROM_EMAIL,
        [notice.user.email],
    )


def _webhook(notice: Notice) -> None:
    wanted = notice.user.notice_settings
    if not wanted.webhook_url:
        raise webhook.NotAllowed(_("There is no address any more."))
    body = {
        "id": notice.pk,
        "kind": notice.kind,
        "text": notice.text,
        "sentence": notice.sentence,
        "url": _address(notice),
        "user": notice.user.username,
        "created_at": notice.created_at.isoformat(),
    }
    webhook.post(
        wanted.webhook_url,
        json.dumps(body, ensure_ascii=False).encode(),
        wanted.webhook_secret,
        int(timezone.now().timestamp()),
    )
