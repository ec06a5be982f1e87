"""What people are told: in the portal always, by e-mail and webhook where they want that."""

import secrets
import uuid

from django.conf import settings
from django.db import models
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, gettext_noop

# kind -> the sentence around the text; other kinds say the text alone
SENTENCES = {
    "run_succeeded": gettext_noop("“%(text)s” has succeeded."),
    "run_failed": gettext_noop("“%(text)s” has failed."),
    "run_cancelled": gettext_noop("“%(text)s” was stopped."),
    "nearly_spent": gettext_noop("%(text)s %% of the compute units are used."),
    "review": gettext_noop("“%(text)s” waits for approval."),
}


class Notice(models.Model):
    """key: what it is about; a second one with the same key is none."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="notices")
    kind = models.CharField(max_length=40)
    text = models.CharField(max_length=500)
    url = models.CharField(max_length=300, blank=True)  # a path of this portal
    key = models.CharField(max_length=120, default=uuid.uuid4)
    created_at = models.DateTimeField(auto_now_add=True)
    read_at = models.DateTimeField(null=True)

    class Meta:
        app_label = "portal"
        verbose_name = gettext_lazy("notice")
        verbose_name_plural = gettext_lazy("notices")
        ordering = ["-id"]
        constraints = [models.UniqueConstraint(fields=["user", "key"], name="one_notice_a_key")]
        indexes = [models.Index(fields=["user", "read_at"])]

    def __str__(self):
        return self.text

    @property
    def sentence(self) -> str:
        """In the active language."""
        return _(SENTENCES.get(self.kind, "%(text)s")) % {"text": self.text}


def new_secret() -> str:
    return secrets.token_urlsafe(32)


class NoticeSettings(models.Model):
    user = models.OneToOneField(
        settings.AUTH_USER_MODEL, models.CASCADE, related_name="notice_settings"
    )
    by_email = models.BooleanField(default=False)
    webhook_url = models.CharField(max_length=500, blank=True)
    webhook_secret = models.CharField(max_length=64, default=new_secret, editable=False)

    class Meta:
        app_label = "portal"

    def __str__(self):
        return str(self.user)


class Delivery(models.Model):
    """One notice on its way out of the portal."""

    class Channel(models.TextChoices):
        EMAIL = "email", gettext_lazy("e-mail")
        WEBHOOK = "webhook", gettext_lazy("webhook")

    notice = models.ForeignKey(Notice, models.CASCADE, related_name="deliveries")
    channel = models.CharField(max_length=10, choices=Channel.choices)
    attempts = models.PositiveSmallIntegerField(default=0)
    next_at = models.DateTimeField(default=timezone.now)
    done_at = models.DateTimeField(null=True)  # sent, or given up
    error = models.CharField(max_length=300, blank=True)  # of the last attempt

    class Meta:
        app_label = "portal"
        indexes = [models.Index(fields=["done_at", "next_at"])]

    def __str__(self):
        return f"{self.channel} {self.notice_id}"
