"""What people are told when a run or an answer fails, by the error's code.

The pure cores and the worker speak English and give every fault a code; its text in the reader's
language is in the explanations.py of the app that raises it, and the original message stays beside
it, with the figures.
"""

from django.utils.translation import gettext_lazy as _

# what portal/runs itself says; the apps add theirs when they are ready
EXPLANATIONS = {
    "disk_full": _("The disk of the server is full. When there is room again the run can go on."),
    "process_lost": _("The process ended in every attempt. The log says more."),
    "too_large_for_devices": _(
        "It needs more memory than any device has. Take a smaller base, shorter texts or smaller "
        "batches."
    ),
    "unexpected": _("Something unexpected went wrong. The log says more."),
}


def explain(sentences: dict) -> None:
    """An app adds what it says about its codes."""
    EXPLANATIONS.update(sentences)


def explained(error: dict | None) -> str:
    """The sentence for an error object; its own message where nobody has a better one."""
    if not error:
        return ""
    return str(EXPLANATIONS.get(error.get("code", "")) or error.get("message", ""))


def sentence(table: dict, code: str, params: dict) -> str:
    """What `table` (code: text with %(placeholders)s, of an app's explanations.py) says, in the
    active language; "" where it has no word for the code.
    """
    return str(table[code]) % params if code in table else ""
