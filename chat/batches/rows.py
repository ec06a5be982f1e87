"""The rows of batches and of the files they are made of. chat/models.py takes them in."""

from __future__ import annotations

import secrets
from pathlib import Path

from django.conf import settings
from django.db import models
from django.utils.translation import gettext_lazy as _

from portal.access import AccessQuerySet, Private
from portal.models import Run, User


def new_file_key() -> str:
    return secrets.token_hex(16)


class ApiFile(Private, models.Model):
    """A file of /v1/files that is no dataset: it lies under its key and never changes."""

    class Purpose(models.TextChoices):
        BATCH = "batch", "batch"
        BATCH_OUTPUT = "batch_output", "batch_output"

    owner = models.ForeignKey(User, models.CASCADE, related_name="api_files")
    key = models.CharField(max_length=32, unique=True, default=new_file_key, editable=False)
    purpose = models.CharField(max_length=12, choices=Purpose.choices)
    name = models.CharField(_("name"), max_length=255)
    size = models.PositiveBigIntegerField()  # bytes
    created_at = models.DateTimeField(auto_now_add=True)

    objects = AccessQuerySet.as_manager()

    class Meta:
        app_label = "chat"
        verbose_name = _("file of a program")
        verbose_name_plural = _("files of programs")
        ordering = ["-id"]

    def __str__(self):
        return self.name

    @property
    def path(self) -> Path:
        return settings.DATA_DIR / "files" / self.key


class BatchRun(Run):
    """`recipe`: {"endpoint", "metadata"}; `total` and `progress` count lines. What has been
    answered stands in the run's folder, a line each (chat/batches/work.py).
    """

    source = models.ForeignKey(ApiFile, models.PROTECT, related_name="batches", editable=False)
    # made at the end; None: there were no such lines
    output = models.ForeignKey(ApiFile, models.SET_NULL, null=True, related_name="+")
    errors = models.ForeignKey(ApiFile, models.SET_NULL, null=True, related_name="+")
    failed = models.PositiveIntegerField(default=0, editable=False)  # lines
    # why the file is refused: [{"code", "message", "param", "line"}]
    problems = models.JSONField(default=list, editable=False)
    validated_at = models.DateTimeField(null=True, editable=False)

    objects = AccessQuerySet.as_manager()

    class Meta:
        app_label = "chat"
        verbose_name = _("batch")
        verbose_name_plural = _("batches")
        ordering = ["-id"]

    @classmethod
    def visibility(cls, user):
        """Its owner's alone: it holds what was asked and answered."""
        return models.Q(owner=user)
