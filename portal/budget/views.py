"""The page of budget and usage: what one has, who used what, and that as CSV."""

from __future__ import annotations

from django.conf import settings
from django.http import StreamingHttpResponse
from django.shortcuts import render
from django.utils import timezone
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET

from portal.budget import pricing, signals, tokens, usage
from portal.budget.holds import payers
from portal.budget.statement import statement
from portal.numbers import whole_number

PERIODS = (7, 30, 90, 365)


@require_GET
def page(request):
    days = _days(request)
    titles = {
        "person": _("By person"),
        "team": _("By team"),
        "adapter": _("By model"),
        "door": _("By way"),
    }
    if not request.user.is_staff:
        del titles["person"]
    charts = [_chart(title, usage.used_by(request.user, by, days)) for by, title in titles.items()]
    daily = usage.used_by(request.user, "day", days)
    statements = [statement(holder) for holder in payers(request.user)] if pricing.on() else []
    context = {
        "days": days,
        "periods": PERIODS,
        "charts": [chart for chart in charts if chart["rows"]],
        "daily": _columns(daily),
        "everybody": request.user.is_staff,
        "statements": [each for each in statements if each.grants or not each.is_team],
        "nearly": signals.NEARLY,
        "tokens_per_day": settings.TOKENS_PER_DAY,
        "tokens_today": tokens.used_today(request.user.pk) if settings.TOKENS_PER_DAY else 0,
        "device_rate": pricing.device_rate(),
        "token_rate": settings.TOKEN_RATE,
    }
    return render(request, "portal/usage.html", context)


@require_GET
def export(request):
    response = StreamingHttpResponse(
        usage.csv_lines(request.user, _days(request)), content_type="text/csv; charset=utf-8"
    )
    name = f"usage-{timezone.localdate():%Y-%m-%d}.csv"
    response["Content-Disposition"] = f'attachment; filename="{name}"'
    return response


def _days(request) -> int:
    """A period that is not offered is the usual one."""
    days = whole_number(request.GET.get("days", ""))
    return days if days and days <= usage.MOST_DAYS else usage.DAYS


def _chart(title: str, rows: list[usage.Row]) -> dict:
    return {
        "title": title,
        "rows": rows,
        "most_tokens": max((row.used.tokens for row in rows), default=0) or 1,
        "most_time": max((row.used.milliseconds for row in rows), default=0) or 1,
    }


def _columns(rows: list[usage.Row]) -> list[dict]:
    """Two charts over time, each a column a day in a box as many wide as days and 100 high."""
    found = []
    for title, is_time, of in (
        (_("Tokens day by day"), False, lambda used: used.tokens),
        (_("Device time day by day"), True, lambda used: used.milliseconds),
    ):
        most = max((of(row.used) for row in rows), default=0)
        columns = [
            {
                "x": number,
                "y": f"{100 - 100 * of(row.used) / most:.2f}",
                "height": f"{100 * of(row.used) / most:.2f}",
                "row": row,
            }
            for number, row in enumerate(rows)
            if of(row.used)
        ]
        found.append(
            {
                "title": title,
                "columns": columns,
                "most": most,
                "is_time": is_time,
                "count": len(rows),
                "first": rows[0].label,
                "last": rows[-1].label,
            }
        )
    return found
