"""Template tags of the portal's own look."""

from uuid import uuid4

from django import template
from django.utils import timezone
from django.utils.formats import date_format
from django.utils.html import format_html
from django.utils.translation import gettext as _

from portal import explanations
from portal.budget import pricing
from portal.devices import reasons
from portal.models import Run

register = template.Library()

TONES = {Run.Status.RUNNING: "run", Run.Status.SUCCEEDED: "good", Run.Status.FAILED: "bad"}


@register.simple_tag
def icon(name, extra=""):
    """An icon of the sprite (templates/portal/_icons.svg); decorative, so hidden from screen
    readers.
    """
    return format_html(
        '<svg class="i{}" aria-hidden="true"><use href="#i-{}"/></svg>',
        f" {extra}" if extra else "",
        name,
    )


@register.simple_tag
def once():
    """The hidden field that makes a second sending the same request (portal/runs/once.py)."""
    return format_html('<input type="hidden" name="once" value="{}">', uuid4().hex)


@register.filter
def tone(status):
    """The colour of a run's badge (data-tone); the word beside it says the same."""
    return TONES.get(status, "")


@register.filter
def duration(seconds):
    """Seconds as people say them: 8 s, 2 min 05 s, 1 h 03 min; empty for None."""
    if seconds in (None, ""):
        return ""
    seconds = round(seconds)
    if seconds < 60:
        return _("%(seconds)d s") % {"seconds": seconds}
    if seconds < 3600:
        return _("%(minutes)d min %(seconds)02d s") % {
            "minutes": seconds // 60,
            "seconds": seconds % 60,
        }
    return _("%(hours)d h %(minutes)02d min") % {
        "hours": seconds // 3600,
        "minutes": seconds % 3600 // 60,
    }


@register.filter
def when(moment):
    """A time of today as 14:52, else with its day, else (another year) with the year; empty for
    None.
    """
    if not moment:
        return ""
    local, now = timezone.localtime(moment), timezone.localtime()
    clock = local.strftime("%H:%M")
    if local.date() == now.date():
        return _("today %(time)s") % {"time": clock}
    if local.year == now.year:
        return f"{date_format(local, 'MONTH_DAY_FORMAT')} {clock}"
    return date_format(local, "DATE_FORMAT")


@register.filter
def thousands(number):
    """12345 as 12,345; empty for None and for what a template did not find."""
    return "" if number in (None, "") else f"{number:,}"


@register.filter
def milliseconds(number):
    """A time in milliseconds, as `duration` says it; empty for none."""
    return duration(number / 1000) if number else ""


@register.filter
def units(micro):
    """Micro-units of the budget as units: 1,234.5."""
    return pricing.in_words(micro)


@register.filter
def units_moved(micro):
    """With their sign; empty for none."""
    return f"{'+' if micro > 0 else '−'}{pricing.in_words(abs(micro))}" if micro else ""


@register.filter
def gigabytes(count):
    """Bytes of memory: 6.1 GB."""
    return reasons.gigabytes(count)


@register.filter
def wait_reason(reason):
    """Why a claim waits for a device, as a sentence."""
    return reasons.in_words(reason)


@register.filter
def split_name(name):
    """What people call a split of a dataset; a split with a name of its own keeps it."""
    return {"train": _("Training"), "validation": _("Validation"), "test": _("Test")}.get(
        name, name
    )


@register.filter
def score(scores, metric):
    """A metric's value of an evaluation's scores, with two decimals."""
    return f"{scores[metric]['value']:.2f}"


@register.filter
def person(user):
    """How people call a user: the full name when there is one, in the order of its script, else the
    username.
    """
    if user is None:  # who has been deleted
        return "—"
    first, last = user.first_name.strip(), user.last_name.strip()
    if not (first or last):
        return user.username
    han = all("\u4e00" <= character <= "\u9fff" for character in first + last)
    return f"{last}{first}" if han else f"{first} {last}".strip()


@register.filter
def is_tuned(label):
    """Whether an answer's model label (chat/conversations/turns.py: `base` or `base:adapter`) names
    an adapter.
    """
    return ":" in (label or "")


@register.filter
def model_name(label):
    """An answer's model label as the chips name the model."""
    base, colon, adapter = (label or "").partition(":")
    return adapter if colon or not base else _("%(name)s · prefix off") % {"name": base}


@register.filter
def explained(error):
    """An error ({"code", "message"}) of a run or an answer as a sentence in the reader's language;
    empty for none.
    """
    return explanations.explained(error)


@register.filter
def signed(number):
    """A difference with its sign and two decimals: +1.25, −0.50."""
    return f"{number:+.2f}".replace("-", "−")
