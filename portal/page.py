"""What every page needs: the shell's context, and how refusals become sentences."""

from django.core.exceptions import ValidationError
from django.utils.functional import SimpleLazyObject

from portal.budget import pricing
from portal.budget.statement import is_nearly_spent
from portal.models import Notice, Run


def shell(request):
    """Context processor. `theme` is written into <html>, so that the first paint is right; `busy`
    is the run that holds the accelerator (anybody's: the rail shows its progress and nothing else
    of it).
    """
    theme = request.COOKIES.get("theme")
    return {
        "theme": theme if theme in ("light", "dark") else None,
        "section": request.path.split("/")[1],
        "budget": pricing.on(),
        "nearly_spent": SimpleLazyObject(lambda: is_nearly_spent(request.user)),
        "unread": SimpleLazyObject(lambda: _unread(request.user)),
        "busy": SimpleLazyObject(
            lambda: (
                Run.objects.filter(status=Run.Status.RUNNING, queue="gpu").order_by("id").first()
            )
        ),
    }


def _unread(user) -> int:
    return Notice.objects.filter(user=user, read_at=None).count() if user.is_authenticated else 0


def reason(error) -> str:
    """A refusal (Django's ValidationError or DRF's APIException) as one line for people."""
    if isinstance(error, ValidationError):
        return " ".join(error.messages)
    return " ".join(_flat(error.detail))


def _flat(detail) -> list[str]:
    if isinstance(detail, dict):
        return [text for value in detail.values() for text in _flat(value)]
    if isinstance(detail, (list, tuple)):
        return [text for value in detail for text in _flat(value)]
    return [str(detail)]
