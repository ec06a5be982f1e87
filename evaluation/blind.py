"""Blind review: which of two answers is better, asked without saying whose they are.

Two evaluations of the same rows are one pair, whichever is named first. Rows whose two answers are
the same are not asked about. Which side an answer stands on is drawn for each person and row, and
stays so when the page is loaded again.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import combinations
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _

from chat.models import Comparison, Message
from evaluation.comparison import check_comparable
from evaluation.models import BlindVote, EvaluationRun, Prediction

Choice = BlindVote.Choice
LEFT, RIGHT, TIE = "left", "right", "tie"
Z = 1.959964  # of a 95 % interval


def pair(one: EvaluationRun, two: EvaluationRun) -> tuple[EvaluationRun, EvaluationRun]:
    """(run, other): the newer first, so that a pair has one list of votes. ValidationError: not
    comparable.
    """
    if one.pk == two.pk:
        raise ValidationError(_("Choose two different evaluations."), "same")
    check_comparable(one, two)
    return (one, two) if one.pk > two.pk else (two, one)


def rows_that_differ(run: EvaluationRun, other: EvaluationRun) -> list[int]:
    theirs = dict(other.predictions.values_list("row", "text"))
    return [
        row
        for row, text in run.predictions.order_by("row").values_list("row", "text")
        if row in theirs and theirs[row].strip() != text.strip()
    ]


def is_swapped(user_id: int, run: EvaluationRun, other: EvaluationRun, row: int) -> bool:
    """Whether `other`'s answer stands on the left; nobody can work it out without the secret."""
    asked = f"blind {user_id} {run.pk} {other.pk} {row}".encode()
    return hmac.digest(settings.SECRET_KEY.encode(), asked, hashlib.sha256)[0] % 2 == 1


def next_question(user, run: EvaluationRun, other: EvaluationRun) -> dict[str, Any]:
    """{"row", "prompt", "reference", "left", "right", "done", "all"}; row None: nothing is left."""
    rows = rows_that_differ(run, other)
    voted = set(
        BlindVote.objects.filter(run=run, other=other, by=user, judge="").values_list(
            "row", flat=True
        )
    )
    row = next((row for row in rows if row not in voted), None)
    told: dict[str, Any] = {"row": row, "done": len(voted), "all": len(rows)}
    if row is None:
        return told
    ours, theirs = (Prediction.objects.get(run=side, row=row) for side in (run, other))
    sides = [ours.text, theirs.text]
    if is_swapped(user.pk, run, other, row):
        sides.reverse()
    return told | {
        "prompt": ours.prompt,
        "reference": ours.reference,
        "left": sides[0],
        "right": sides[1],
    }


def vote(user, run: EvaluationRun, other: EvaluationRun, row: int | None, side: str) -> None:
    """Notes a person's choice, "left", "right" or "tie"; a second one takes the first's place."""
    if side not in (LEFT, RIGHT, TIE):
        raise ValidationError(_("Choose left, right or equal."), "invalid")
    if row is None or not run.predictions.filter(row=row).exists():
        raise ValidationError(_("There is no such row."), "no_such_row")
    choice = Choice.TIE
    if side != TIE:
        ours = (side == LEFT) != is_swapped(user.pk, run, other, row)
        choice = Choice.RUN if ours else Choice.OTHER
    BlindVote.objects.update_or_create(
        run=run, other=other, row=row, by=user, judge="", defaults={"choice": choice}
    )


def result(run: EvaluationRun, other: EvaluationRun, *, judges: bool = False) -> dict[str, Any]:
    """{"votes", "run", "other", "tie", "rate", "low", "high", "p", "verdict", "reviewers",
    "agreement", "kappa"} of people's votes, or of models' (`judges`).

    rate: percent of the decided votes that prefer `run`, with Wilson's 95 % interval; p: two-sided
    sign test. agreement: percent of pairs of reviewers of one row that chose the same; kappa: that
    beyond what chance would agree on (Fleiss 1971). None where nothing can be said.
    """
    found = BlindVote.objects.filter(run=run, other=other)
    found = found.exclude(judge="") if judges else found.filter(judge="")
    votes = list(found.values_list("row", "by", "judge", "choice"))
    agreement, kappa = agreed((row, choice) for row, _by, _judge, choice in votes)
    return {
        **_counted(Counter(choice for *_row, choice in votes)),
        "reviewers": len({(by, judge) for _row, by, judge, _choice in votes}),
        "agreement": agreement,
        "kappa": kappa,
    }


def in_chat(run: EvaluationRun, other: EvaluationRun) -> dict[str, Any]:
    """The same of questions that people asked both models at once in chat, each a vote. Not blind:
    they saw whose answers they were.
    """
    found = Comparison.objects.exclude(verdict__in=("", Comparison.Verdict.NONE))
    for side in (run, other):
        theirs = Message.objects.filter(checkpoint=side.checkpoint_id, adapter=side.adapter_id)
        found = found.filter(pk__in=theirs.exclude(comparison=None).values("comparison"))
    choices: dict[tuple, Any] = {
        (run.checkpoint_id, run.adapter_id): Choice.RUN,
        (other.checkpoint_id, other.adapter_id): Choice.OTHER,
    }
    votes: Counter[Any] = Counter()
    people = set()
    asked = found.values_list(
        "verdict", "chosen__checkpoint", "chosen__adapter", "conversation__owner"
    )
    for verdict, checkpoint, adapter, person in asked:
        same = verdict == Comparison.Verdict.SAME
        choice: Any = Choice.TIE if same else choices.get((checkpoint, adapter))
        if choice is not None:  # else a third model was better
            votes[choice] += 1
            people.add(person)
    return {**_counted(votes), "reviewers": len(people), "agreement": None, "kappa": None}


def _counted(votes: Counter) -> dict[str, Any]:
    wins, losses = votes[Choice.RUN], votes[Choice.OTHER]
    low, high = wilson(wins, wins + losses)
    return {
        "votes": votes.total(),
        "run": wins,
        "other": losses,
        "tie": votes[Choice.TIE],
        "rate": 100 * wins / (wins + losses) if wins + losses else None,
        "low": low,
        "high": high,
        "p": sign_test(wins, losses),
        "verdict": _verdict(low, high),
    }


def _verdict(low: float | None, high: float | None) -> str:
    if low is not None and low > 50:
        return "run"
    if high is not None and high < 50:
        return "other"
    return "cannot_tell"


def wilson(wins: int, trials: int) -> tuple[float | None, float | None]:
    """Wilson's 95 % score interval of a share, in percent; (None, None) without a trial."""
    if not trials:
        return None, None
    share, z2 = wins / trials, Z * Z
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = (
        Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    )
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def sign_test(wins: int, losses: int) -> float | None:
    """Two-sided, exact: how likely so uneven a split of fair coins is."""
    trials = wins + losses
    if not trials:
        return None
    tail = sum(math.comb(trials, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**trials)


def agreed(votes: Iterable[tuple[int, str]]) -> tuple[float | None, float | None]:
    """(percent of pairs of votes on one row that agree, Fleiss' kappa) over rows with two votes or
    more; None where there are none, kappa None too where everybody always chose one thing.
    """
    by_row: dict[int, list[str]] = defaultdict(list)
    for row, choice in votes:
        by_row[row].append(choice)
    several = [choices for choices in by_row.values() if len(choices) > 1]
    if not several:
        return None, None
    shares = []
    for choices in several:
        pairs = list(combinations(choices, 2))
        shares.append(sum(one == two for one, two in pairs) / len(pairs))
    seen = sum(shares) / len(shares)
    totals = Counter(choice for choices in several for choice in choices)
    chance = sum((count / totals.total()) ** 2 for count in totals.values())
    kappa = None if chance == 1 else (seen - chance) / (1 - chance)
    return 100 * seen, kappa
