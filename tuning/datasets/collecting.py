"""Good answers from chat, collected into a dataset that somebody reviews.

An answer is proposed (`collect_answer`), corrected or as it is, with the turns that the model saw
before it; who may change the dataset takes the waiting ones into a new version, or leaves them
(`decide`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils import timezone
from django.utils.translation import gettext as _

from chat.conversations.messages import turns_before
from chat.models import Comparison, Message
from tuning.datasets.editing import change_rows, line_of
from tuning.datasets.store import TRAIN
from tuning.models import CollectedExample, Dataset, DatasetVersion

Status = CollectedExample.Status


def collection_of(user) -> Dataset:
    """The user's own dataset for collected answers, made with the first one."""
    own = Dataset.objects.filter(owner=user, collects=True, deleted_at=None)
    return own.first() or Dataset.objects.create(
        owner=user,
        name=_("Good answers"),
        prompt_column="prompt",
        response_column="response",
        history_column="history",
        collects=True,
    )


def collect_answer(
    user, message: Message, *, response: str | None = None, dataset: Dataset | None = None
) -> CollectedExample:
    """Proposes a model's answer as a row. `message`: the answer, of a conversation of the user's;
    `response`: what it should have said, where it is corrected; `dataset`: one that the user sees,
    else their own collection.

    A second call for the same answer changes the row, as long as nobody has decided. Raises
    ValidationError: no answer, not ended, empty, decided already.
    """
    if message.role != Message.Role.ASSISTANT or message.is_in_flight:
        message_ = _("Only an answer that has ended can be collected.")
        raise ValidationError({"message": ValidationError(message_, "no_answer")})
    prompt, history = _asked(message)
    text = message.content if response is None else response
    line_of(prompt, text, history)
    with transaction.atomic():
        dataset = dataset or collection_of(user)
        found = CollectedExample.objects.filter(dataset=dataset, message=message).first()
        if found is None:
            found = CollectedExample(dataset=dataset, message=message, by=user)
        elif found.status == Status.TAKEN:
            told = _("This answer is a row of the dataset already.")
            raise ValidationError({"message": ValidationError(told, "already_taken")})
        found.prompt, found.history, found.response = prompt, history, text
        found.original = "" if text == message.content else message.content
        found.model_label = message.model_label
        found.status, found.decided_at, found.decided_by = Status.WAITING, None, None
        found.save()
    return found


def collect_better(comparison: Comparison) -> None:
    """Proposes the better one of compared answers as a row of the asker's collection; of a verdict
    that was changed, the one before no longer. What somebody corrected stays.
    """
    user, chosen = comparison.conversation.owner, comparison.chosen
    earlier = CollectedExample.objects.filter(
        by=user, message__comparison=comparison, status=Status.WAITING, original=""
    )
    earlier.exclude(message=chosen).delete()
    if chosen is not None:
        with contextlib.suppress(ValidationError):  # still being written, empty, or a row already
            collect_answer(user, chosen)


def _asked(answer: Message) -> tuple[str, list[list[str]]]:
    """(question, [[question, answer], ...] before it) as the model was asked."""
    rounds: list[list[str]] = []
    system = ""
    for turn in turns_before(answer):
        if turn["role"] == "user":
            rounds.append([turn["content"]])
        elif turn["role"] == "assistant" and rounds:
            rounds[-1][1:] = [turn["content"]]
        elif turn["role"] == "system":
            system = turn["content"]
    if not rounds or len(rounds[-1]) != 1:
        told = _("The question of this answer is gone.")
        raise ValidationError({"message": ValidationError(told, "no_question")})
    if system:  # where uploads have it too (tuning/datasets/rows.py)
        rounds[0][0] = f"{system}\n{rounds[0][0]}"
    *history, (prompt,) = rounds
    return prompt, [turn for turn in history if len(turn) == 2]


def withdraw(example: CollectedExample) -> None:
    """Takes a proposal back. ValidationError once it is a row."""
    deleted, _rows = CollectedExample.objects.filter(
        pk=example.pk, status__in=(Status.WAITING, Status.LEFT)
    ).delete()
    if not deleted:
        message = _("This answer is a row of the dataset already.")
        raise ValidationError(message, "already_taken")


def decide(
    dataset: Dataset, user, *, take: Iterable[int] = (), leave: Iterable[int] = ()
) -> DatasetVersion | None:
    """Takes waiting examples (by id) as training rows of a new version and leaves others out; the
    new version, if one was made. ValidationError for an id that does not wait here.
    """
    take, leave = set(take), set(leave)
    with transaction.atomic():
        dataset = Dataset.objects.select_for_update().get(pk=dataset.pk)
        waiting = {
            example.pk: example
            for example in dataset.collected.filter(status=Status.WAITING, pk__in=take | leave)
        }
        if unknown := sorted((take | leave) - waiting.keys()) or sorted(take & leave):
            message = _("No example %(id)s waits here, or it is named twice.")
            raise ValidationError(message % {"id": unknown[0]}, "not_waiting")
        version = None
        if take:
            chosen = [waiting[pk] for pk in sorted(take)]
            lines = [line_of(row.prompt, row.response, row.history) for row in chosen]
            version = change_rows(
                dataset, TRAIN, base=dataset.current, added=lines, action="collect"
            )
        decided = {"decided_at": timezone.now(), "decided_by": user}
        rows = CollectedExample.objects
        rows.filter(pk__in=take).update(status=Status.TAKEN, version=version, **decided)
        rows.filter(pk__in=leave).update(status=Status.LEFT, **decided)
    return version
