"""Which texts can be kept and sent on."""

import re

from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

# characters of one message, at every door; what fits into the context is the worker's decision
LONGEST_CONTENT = 200_000
# how a cell begins that spreadsheets compute, full-width forms included
_FORMULA = re.compile(r"\s*[=+\-@\t\r＝＋－＠]")


def is_storable(text: str) -> bool:
    """JSON can spell a NUL and half a character (a lone surrogate); PostgreSQL takes no NUL, and
    UTF-8 no half character.
    """
    try:
        text.encode()  # not character by character: that takes 0.3 s for a few megabytes
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def shown(value, most: int = 120) -> str:
    """Whatever a client sent, fit to be repeated in a message to it."""
    return str(value)[:most].encode(errors="replace").decode()


def check_content(content) -> str:
    """A message's text as it is; ValidationError when no door takes it."""
    if not isinstance(content, str):
        raise ValidationError(_("Must be a text."), "invalid")
    if len(content) > LONGEST_CONTENT:
        message = _("The text has %(length)s characters; at most %(most)s are possible.")
        raise ValidationError(
            message % {"length": f"{len(content):,}", "most": f"{LONGEST_CONTENT:,}"}, "too_long"
        )
    if not is_storable(content):
        raise ValidationError(_("The text contains a NUL or half a character."), "invalid")
    return content


def safe_cell(text: str) -> str:
    """Of a CSV file: what could begin a formula in a spreadsheet begins with an apostrophe, as
    OWASP advises.
    """
    return f"'{text}" if _FORMULA.match(text) else text
