"""A model as judge of two evaluations, through any OpenAI-compatible endpoint. Its votes are kept
apart from people's and marked as a model's.

Every row is asked twice with the sides exchanged, for judges favour a side (Zheng et al. 2023,
"Judging LLM-as-a-Judge", position bias): a preference that does not survive that is a tie.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx2

from evaluation.blind import rows_that_differ
from evaluation.models import BlindVote, EvaluationRun

Choice = BlindVote.Choice
TIMEOUT = 120.0  # seconds for one answer
ATTEMPTS = 3
INSTRUCTION = (
    "Two assistants answered the same request. Judge which answer serves it better; do not reward "
    "length. Reply with one letter alone: A, B, or C when they are equally good.\n\n"
    "Request:\n{prompt}\n\nA good answer, for comparison:\n{reference}\n\n"
    "Answer A:\n{first}\n\nAnswer B:\n{second}\n\nYour letter:"
)


# what the two replies, the second with the sides exchanged, say together; any other is a tie
_CONSISTENT = {"AB": str(Choice.RUN), "BA": str(Choice.OTHER)}


class JudgeFailed(Exception):
    """The endpoint refused, or did not answer as one that speaks OpenAI's protocol."""


class Judge:
    def __init__(self, url: str, model: str, key: str = ""):
        """url: up to and with /v1."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.model = model
        self._client = httpx2.Client(
            base_url=url.rstrip("/") + "/", headers=headers, timeout=TIMEOUT
        )

    def prefers(self, prompt: str, reference: str, first: str, second: str) -> str | None:
        """ "A", "B" or "C"; None where its reply is none of them. Raises JudgeFailed."""
        content = INSTRUCTION.format(
            prompt=prompt, reference=reference, first=first or "—", second=second or "—"
        )
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 8,
        }
        problem = ""
        for _attempt in range(ATTEMPTS):
            try:
                answer = self._client.post("chat/completions", json=body)
                if answer.status_code == 200:
                    return letter(answer.json()["choices"][0]["message"]["content"])
                problem = f"HTTP {answer.status_code}: {answer.text[:200]}"
                if answer.status_code < 500 and answer.status_code != 429:
                    break
            except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as fault:
                problem = f"{type(fault).__name__}: {fault}"
        raise JudgeFailed(problem)

    def close(self) -> None:
        self._client.close()


def letter(reply: str | None) -> str | None:
    """The first lone A, B or C of a reply."""
    found = re.search(r"(?<![A-Za-z])([ABC])(?![A-Za-z])", reply or "")
    return found.group(1) if found else None


def judged(
    judge: Judge, by, run: EvaluationRun, other: EvaluationRun, most: int | None = None
) -> Iterator[tuple[int, str]]:
    """Asks about the rows that differ and that this judge has not decided, `most` of them; yields
    (row, choice) as each is noted.
    """
    mine = BlindVote.objects.filter(run=run, other=other, judge=judge.model)
    done = set(mine.values_list("row", flat=True))
    rows = [row for row in rows_that_differ(run, other) if row not in done][:most]
    theirs = dict(other.predictions.values_list("row", "text"))
    for row in rows:
        ours = run.predictions.get(row=row)
        asked = ours.prompt, ours.reference
        there = judge.prefers(*asked, ours.text, theirs[row])
        back = judge.prefers(*asked, theirs[row], ours.text)
        choice = _CONSISTENT.get(f"{there}{back}", str(Choice.TIE))
        BlindVote.objects.update_or_create(
            run=run, other=other, row=row, by=by, judge=judge.model, defaults={"choice": choice}
        )
        yield row, choice
