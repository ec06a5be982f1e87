"""Who decided what, and when: Django's own log of the admin, for decisions made anywhere."""

from __future__ import annotations

from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType


def note(user, row, message: str) -> None:
    """Adds a line about `row`: `message` is a few words, in English, with what people wrote."""
    line(user, type(row), row.pk, str(row), message)


def line(user, model, key, named: str, message: str) -> None:
    """The same about something that may have no row: what it is called, under which key."""
    LogEntry.objects.create(
        user=user,
        content_type=ContentType.objects.get_for_model(model),
        object_id=str(key),
        object_repr=named[:200],
        action_flag=CHANGE,
        change_message=message,
    )
