"""What is told of the four metrics of ChatGLM-6B's evaluate.sh, and of the likelihood of the
reference. They are not counted here: evaluation/metrics/original.py counts the four together,
evaluation/likelihood.py asks the model.

The published figures: ChatGLM-6B's ptuning/README.md, ADGEN's dev set, "Finetune" and "P-tuning v2
(128)".
"""

from __future__ import annotations

import numpy as np

from evaluation.metrics.metric import Metric, _

_WHOSE = "ADGEN, ChatGLM-6B, P-tuning v2", "ADGEN, ChatGLM-6B, full fine-tuning"


def _published(tuned: float, full: float) -> tuple[tuple[str, float], ...]:
    return tuple(zip(_WHOSE, (tuned, full), strict=True))


ROUGE_1 = Metric(
    "rouge-1",
    _("ROUGE-1"),
    _(
        "How many words the answer shares with the reference, whatever their order: the balance of "
        "precision and recall over words cut by jieba. 100 is the same words; unlike texts of one "
        "subject reach 10 to 20."
    ),
    published=_published(31.12, 31.23),
)
ROUGE_2 = Metric(
    "rouge-2",
    _("ROUGE-2"),
    _(
        "The same over pairs of neighbouring words, so phrases count. It is much lower than "
        "ROUGE-1; free writing seldom passes 10."
    ),
    published=_published(7.11, 7.36),
)
ROUGE_L = Metric(
    "rouge-l",
    _("ROUGE-L"),
    _(
        "The longest sequence of words that both have in the same order, gaps allowed. It follows "
        "the order of what is said."
    ),
    published=_published(24.97, 25.08),
)
BLEU_4 = Metric(
    "bleu-4",
    _("BLEU-4"),
    _(
        "How much of the answer's runs of 1 to 4 characters the reference has too, row by row, "
        "then the mean; answers that are too short lose. Only to be compared with other figures of "
        "the same script."
    ),
    published=_published(8.10, 8.01),
)


def _perplexity(sums: np.ndarray) -> np.ndarray:
    """sums [..., 2]: negative log-likelihood in nats, tokens."""
    tokens = np.maximum(sums[..., 1], 1)
    return np.exp(np.minimum(sums[..., 0] / tokens, 50.0))


PERPLEXITY = Metric(
    "perplexity",
    _("Perplexity of the reference"),
    _(
        "How surprised the model is by the reference, token by token: 1 is not at all, 100 is as "
        "if it chose among 100 tokens. Only models with the same tokenizer can be compared."
    ),
    better="lower",
    unit="",
    combine=_perplexity,
)
