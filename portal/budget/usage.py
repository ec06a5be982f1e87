"""Who used what: tokens and device time by person, team, model, way and day. Kept and shown with or
without a budget. Members see their own, administrators everybody's.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import date, timedelta
from typing import Any

from django.db.models import Count, QuerySet, Sum
from django.utils import timezone
from django.utils.translation import gettext as _

from portal.budget.models import DeviceUse
from portal.models import Run, Team, TokenUsage, User
from portal.text import safe_cell

DAYS = 30  # that are added up where nobody says
MOST_DAYS = 366
BY = ("person", "team", "adapter", "door", "day")
COLUMNS = {"person": "user", "team": "user", "adapter": "model", "day": "day"}


@dataclass
class Used:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    answers: int = 0
    milliseconds: int = 0
    runs: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def seconds(self) -> float:
        return self.milliseconds / 1000

    def add(self, other: Used) -> None:
        for each in fields(Used):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(frozen=True)
class Row:
    key: str  # as scripts know it: a username, a team's name, base:adapter, a way, a day
    label: str  # for people
    used: Used


def first_day(days: int) -> date:
    return timezone.localdate() - timedelta(days=days - 1)


def _seen(model, viewer: User, days: int) -> QuerySet:
    rows = model.objects.filter(day__gte=first_day(days)).order_by()
    return rows if viewer.is_staff else rows.filter(user=viewer)


def used_by(viewer: User, by: str, days: int = DAYS) -> list[Row]:
    """What `viewer` may see, added up by one of BY: most device time first, then most tokens; days
    in their order, empty ones too.
    """
    sums: dict[Any, Used] = {}
    tokens = _seen(TokenUsage, viewer, days).values_list(COLUMNS.get(by, "door"))
    for key, prompt, completion, answers in tokens.annotate(
        Sum("prompt_tokens"), Sum("completion_tokens"), Sum("answers")
    ):
        sums.setdefault(key, Used()).add(Used(prompt, completion, answers))
    device = _seen(DeviceUse, viewer, days).values_list(COLUMNS.get(by, "kind"))
    for key, milliseconds, runs in device.annotate(
        Sum("milliseconds"), Count("run", distinct=True)
    ):
        sums.setdefault(key, Used()).add(Used(milliseconds=milliseconds, runs=runs))
    if by == "day":
        every = (first_day(days) + timedelta(days=number) for number in range(days))
        return [Row(str(day), str(day), sums.get(day, Used())) for day in every]
    rows = _by_team(viewer, sums) if by == "team" else _named(by, sums)
    return sorted(rows, key=lambda row: (-row.used.milliseconds, -row.used.tokens, row.key))


def _named(by: str, sums: dict[Any, Used]) -> list[Row]:
    if by == "person":
        from portal.templatetags.portal import person

        people = User.objects.in_bulk(list(sums))
        return [Row(people[pk].username, person(people[pk]), used) for pk, used in sums.items()]
    if by == "door":
        labels = dict(TokenUsage.Door.choices) | dict(Run.Kind.choices)
        return [Row(key, str(labels.get(key, key)), used) for key, used in sums.items()]
    return [Row(key, key or _("not known"), used) for key, used in sums.items()]


def _by_team(viewer: User, sums: dict[Any, Used]) -> list[Row]:
    """What a team's members have used; who is in two counts in both."""
    teams = Team.objects.all() if viewer.is_staff else viewer.teams.all()
    found: dict[str, Used] = {}
    members = teams.filter(members__in=list(sums)).values_list("name", "members")
    for name, member in members:
        if member in sums:
            found.setdefault(name, Used()).add(sums[member])
    return [Row(name, name, used) for name, used in found.items()]


class _Echo:
    """A file for csv.writer that gives its lines back."""

    def write(self, text: str) -> str:
        return text


def csv_lines(viewer: User, days: int = DAYS) -> Iterator[str]:
    """A byte order mark for Excel, the header, a line for each day, person, way and model."""
    writer = csv.writer(_Echo())
    header = "day,person,through,model,prompt_tokens,completion_tokens,answers,device_seconds"
    yield "\ufeff" + writer.writerow(header.split(","))
    tokens = _seen(TokenUsage, viewer, days).order_by("day", "user__username", "door", "model")
    for day, person, door, model, *counts in tokens.values_list(
        "day",
        "user__username",
        "door",
        "model",
        "prompt_tokens",
        "completion_tokens",
        "answers",
    ).iterator():
        yield writer.writerow([day, safe_cell(person), door, safe_cell(model), *counts, ""])
    device = _seen(DeviceUse, viewer, days).order_by("day", "user__username", "id")
    for day, person, kind, model, milliseconds in device.values_list(
        "day", "user__username", "kind", "model", "milliseconds"
    ).iterator():
        seconds = milliseconds / 1000
        yield writer.writerow([day, safe_cell(person), kind, safe_cell(model), "", "", "", seconds])
