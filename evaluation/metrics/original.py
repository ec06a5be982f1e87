"""ROUGE-1/2/L and BLEU-4 as ChatGLM-6B's evaluate.sh counts them. Pure: no torch, no Django.

Per pair of texts: both are cut into words by jieba; ROUGE is rouge_chinese's F measure over those
words; BLEU is nltk's sentence BLEU over single characters with smoothing method 3. Every score is
in percent, rounded to 4 places (the original's compute_metrics). Two differences, on purpose: an
empty or blank text scores 0 instead of losing the evaluation, and the longest common subsequence
behind ROUGE-L is counted with bit operations, so that two texts of thousands of words take
milliseconds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import jieba
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from evaluation.metrics import METRICS

NOTHING = {metric: 0.0 for metric in METRICS}

jieba.setLogLevel(logging.WARNING)
_NGRAMS = Rouge(metrics=["rouge-1", "rouge-2"], stats=["f"])
_SMOOTHING = SmoothingFunction().method3


class Scorer:
    """Scores pairs of texts. Loads jieba's dictionary on first use: about a second, or a third of
    it from `cache_folder`.
    """

    def __init__(self, cache_folder: str | Path | None = None):
        """`cache_folder`: a folder only this user can write to (jieba's own choice, the shared
        temporary folder, is not).

        None: nothing is written.
        """
        self._words = jieba.Tokenizer()
        self._cache_folder = cache_folder

    def cut(self, text: str) -> list[str]:
        """The words of a text, blanks among them, as jieba cuts them."""
        if not self._words.initialized:
            if self._cache_folder is None:
                self._words.FREQ, self._words.total = self._words.gen_pfdict(
                    self._words.get_dict_file()
                )
                self._words.initialized = True
            else:
                Path(self._cache_folder).mkdir(parents=True, exist_ok=True)
                self._words.tmp_dir = str(self._cache_folder)
        return self._words.lcut(text)

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """{"rouge-1", "rouge-2", "rouge-l", "bleu-4"} in percent."""
        if not prediction.strip() or not reference.strip():
            return dict(NOTHING)
        predicted, expected = " ".join(self.cut(prediction)), " ".join(self.cut(reference))
        ngrams = _NGRAMS.get_scores([predicted], [expected])[0]
        bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=_SMOOTHING)
        return {
            "rouge-1": round(ngrams["rouge-1"]["f"] * 100, 4),
            "rouge-2": round(ngrams["rouge-2"]["f"] * 100, 4),
            "rouge-l": round(_rouge_l(_rouge_words(predicted), _rouge_words(expected)) * 100, 4),
            "bleu-4": round(float(bleu) * 100, 4),
        }


def _rouge_words(text: str) -> list[str]:
    """The words that rouge_chinese compares for ROUGE-L: its sentence cut starts some of them
    anew.
    """
    sentences = (" ".join(sentence.split()) for sentence in _NGRAMS.cut_sent(text) if sentence)
    return [word for sentence in sentences for word in sentence.split(" ")]


def _rouge_l(predicted: Sequence[str], expected: Sequence[str]) -> float:
    common = common_subsequence_length(predicted, expected)
    precision, recall = common / len(predicted), common / len(expected)
    return 2.0 * precision * recall / (precision + recall + 1e-8)  # rouge_chinese's own smoothing


def common_subsequence_length(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence, one bit per element of `left` (Hyyrö 2004,
    "Bit-parallel LCS-length computation").

    O(len(left) * len(right) / 64) machine steps; rouge_chinese's table in a Python dict takes 4 s
    for two texts of 2,000 words.
    """
    positions: dict[str, int] = {}
    for index, element in enumerate(left):
        positions[element] = positions.get(element, 0) | 1 << index
    ones = (1 << len(left)) - 1
    row = ones  # a 0 bit: the subsequence grows at that element of `left`
    for element in right:
        match = row & positions.get(element, 0)
        row = ((row + match) | (row - match)) & ones
    return len(left) - row.bit_count()
