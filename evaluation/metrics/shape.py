"""What an answer looks like beside its reference, whatever it says."""

from __future__ import annotations

from evaluation.metrics.metric import _, metric, ratio

REPEATED = 4  # characters of a run that counts as repeated


@metric(
    "length-ratio",
    label=_("Length ratio"),
    explanation=_(
        "Characters of all answers over characters of all references: 1 is as long, below is "
        "shorter. A model that breaks off early or never ends shows here first."
    ),
    better="neither",
    unit="",
    count=lambda prediction, reference: [len(prediction.strip()), len(reference.strip())],
    combine=ratio,
)
def length_ratio(prediction: str, reference: str) -> float:
    return len(prediction.strip()) / max(1, len(reference.strip()))


@metric(
    "repetition",
    label=_("Repetition"),
    explanation=_(
        "How much of an answer has been said before in the same answer, in runs of 4 characters. "
        "People's texts stay below 5; a model in a loop nears 100."
    ),
    better="lower",
)
def repetition(prediction: str, reference: str) -> float:
    """Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training": rep-n, here over
    characters.
    """
    runs = [prediction[at : at + REPEATED] for at in range(len(prediction) - REPEATED + 1)]
    return 100.0 * (1 - len(set(runs)) / len(runs)) if runs else 0.0


@metric(
    "exact-match",
    label=_("Exact match"),
    explanation=_(
        "Answers that are the reference, character by character, blanks at both ends aside. For "
        "classes, numbers and names; free writing has 0."
    ),
)
def exact_match(prediction: str, reference: str) -> float:
    return 100.0 * (prediction.strip() == reference.strip())
