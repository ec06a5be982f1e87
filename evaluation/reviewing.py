"""Approving and rejecting an evaluation, and what hangs on it. Every decision is noted in the audit
log.
"""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db.models import Q
from django.urls import reverse
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop

from evaluation.models import EvaluationRun
from portal import audit
from portal.models import User
from portal.notices.notify import notify

NOTED: dict[Any, str] = {
    EvaluationRun.Review.APPROVED: gettext_noop("approved"),
    EvaluationRun.Review.REJECTED: gettext_noop("rejected"),
    EvaluationRun.Review.NONE: gettext_noop("review taken back"),
}


def may_review(user) -> bool:
    return user.is_active and (user.is_staff or user.is_reviewer)


def review(user, run: EvaluationRun, decision: str, note: str = "") -> None:
    """Writes a reviewer's decision ("approved", "rejected", "" takes it back) onto the evaluation.

    Raises ValidationError: no reviewer, not ended with scores, no such decision, a rejection
    without a word.
    """
    note = note.strip()
    if not may_review(user):
        raise ValidationError(_("Only a reviewer may decide this."), "not_a_reviewer")
    if decision not in EvaluationRun.Review.values:
        raise ValidationError(
            {"decision": ValidationError(_("A decision is approved or rejected."), "invalid")}
        )
    if run.scores is None or run.status != EvaluationRun.Status.SUCCEEDED:
        raise ValidationError(
            _("The evaluation has no scores, so there is nothing to decide on."), "no_scores"
        )
    if decision == EvaluationRun.Review.REJECTED and not note:
        raise ValidationError(
            {"note": ValidationError(_("Say in a note why it is rejected."), "required")}
        )
    run.review, run.review_note = decision, note
    run.reviewed_by, run.reviewed_at = (user, timezone.now()) if decision else (None, None)
    run.save(update_fields=["review", "review_note", "reviewed_by", "reviewed_at"])
    audit.note(user, run, NOTED[decision] + (f": {note}" if note else ""))


def ask_for_review(run: EvaluationRun) -> None:
    """Tells the reviewers, where a tuned model needs an approved evaluation and has none."""
    if not settings.APPROVAL_NEEDED or run.adapter is None or is_approved(run.adapter):
        return
    url = reverse("evaluation_run", args=[run.pk])
    reviewers = User.objects.filter(Q(is_staff=True) | Q(is_reviewer=True), is_active=True)
    for reviewer in reviewers.exclude(pk=run.owner_id):
        notify(reviewer, "review", run.name, url, key=f"review:{run.pk}")


def is_approved(adapter) -> bool:
    """Whether the newest decision on any evaluation of the adapter approves it."""
    decided = adapter.evaluation_runs.exclude(review="").order_by("-reviewed_at").first()
    return decided is not None and decided.review == EvaluationRun.Review.APPROVED


def needs_approval(adapter) -> str | None:
    """Why the adapter may not be shared with the team yet (chat/registry.py), or None."""
    if settings.APPROVAL_NEEDED and not is_approved(adapter):
        return _("“%(name)s” needs an approved evaluation before the team can have it.") % {
            "name": adapter.name
        }
    return None
