"""Who decided what, and when: Django's own log of the admin, for decisions made anywhere."""

from __future__ import annotations

from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType


def note(user, row, message: str) -> None:
    """Adds a line about `row`: `message` is a few words, in English, with what people wrote."""
    LogEntry.objects.create(
        user=user,
        content_type=ContentType.objects.get_for_model(row),
        object_id=str(row.pk),
        object_repr=str(row)[:200],
        action_flag=CHANGE,
        change_message=message,
    )
