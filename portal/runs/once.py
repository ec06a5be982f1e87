"""A request that makes a run makes one, however often it is sent: a double click, a client that
repeats after a cut connection. The client names the request (`Idempotency-Key`, or the hidden field
of a form); the same name from the same user is answered with the run that it made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.utils import timezone
from django.utils.translation import gettext as _

from portal.models import IdempotencyKey, Run
from portal.runs.work import work_of
from portal.text import is_storable

R = TypeVar("R", bound=Run)

LONGEST = 255
KEPT = timedelta(days=1)  # a repetition later than this is a new request


class KeyReused(ValidationError):
    """The name was used for another request."""


def once(owner, key: str, asked, make: Callable[[], R]) -> R:
    """`make()`, or the run that the same request has made. key: "" for a request without a name;
    asked: what was sent, as JSON can say it.

    Raises KeyReused, and whatever `make` raises: then nothing is remembered.
    """
    if not key:
        return make()
    if len(key) > LONGEST or not is_storable(key):
        message = _("An idempotency key has at most %(most)s characters.")
        raise ValidationError(message % {"most": LONGEST}, code="invalid_idempotency_key")
    said = json.dumps(asked, sort_keys=True, default=str)
    digest = hashlib.sha256(said.encode()).hexdigest()
    mine = IdempotencyKey.objects.filter(owner=owner, key=key)
    mine.filter(created_at__lt=timezone.now() - KEPT).delete()
    try:
        with transaction.atomic():
            # a second one at the same time waits here for the first's transaction
            row = IdempotencyKey.objects.create(owner=owner, key=key, digest=digest)
            made = make()
            row.run = made
            row.save(update_fields=["run"])
            return made
    except IntegrityError:
        earlier = mine.select_related("run").first()
        if earlier is None or earlier.run is None:
            raise
    if earlier.digest != digest:
        message = _("This idempotency key was used for another request.")
        raise KeyReused(message, code="idempotency_key_reused")
    return cast(R, work_of(earlier.run.kind).model.objects.get(pk=earlier.run_id))


def once_per_form(request, make: Callable[[], R]) -> R:
    """Of a page's form, whose hidden field `once` names the page as it was shown. Who goes back and
    asks for something else there means a new run.
    """
    asked = [request.path, {name: request.POST.getlist(name) for name in request.POST}]
    asked[1].pop("csrfmiddlewaretoken", None)
    try:
        return once(request.user, request.POST.get("once", ""), asked, make)
    except KeyReused:
        return make()
