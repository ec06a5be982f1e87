"""Scores against values worked out by hand and against the libraries that upstream uses."""

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_chinese import Rouge
from sacrebleu.metrics import BLEU, CHRF

from evaluation import metrics
from evaluation.intervals import average
from evaluation.metrics import METRICS, measured
from evaluation.metrics.original import Scorer, common_subsequence_length

ZERO = dict.fromkeys(METRICS, 0.0)


def test_a_pair_worked_out_by_hand(scorer):
    prediction, reference = "红色裙子很好看", "红色裙子真好看"
    assert scorer.cut(prediction) == ["红色", "裙子", "很", "好看"]
    assert scorer.cut(reference) == ["红色", "裙子", "真", "好看"]
    # words: 3 of 4 in common, and in order; word pairs: 1 of 3 (红色 裙子)
    # characters: 6 of 7, pairs 4 of 6, triples 2 of 5, quadruples 1 of 4
    bleu = (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert scorer.score(prediction, reference) == {
        "rouge-1": 75.0,
        "rouge-2": 33.3333,
        "rouge-l": 75.0,
        "bleu-4": round(100 * bleu, 4),
    }


def test_a_shorter_prediction_is_penalised(scorer):
    prediction, reference = "红色裙子", "红色裙子真好看"
    # every n-gram is right, so BLEU is the brevity penalty alone: exp(1 - 7/4)
    # words: 2 of 2 and 2 of 4, F = 2/3; pairs: 1 of 1 and 1 of 3, F = 1/2
    assert scorer.score(prediction, reference) == {
        "rouge-1": 66.6667,
        "rouge-2": 50.0,
        "rouge-l": 66.6667,
        "bleu-4": round(100 * math.exp(1 - 7 / 4), 4),
    }


def test_smoothing_keeps_a_short_match_above_zero(scorer):
    # one character of one: method 3 halves the precision anew for every missing length: 1, 1/2,
    # 1/4, 1/8
    assert scorer.score("裙", "裙")["bleu-4"] == round(100 * (1 * 1 / 2 * 1 / 4 * 1 / 8) ** 0.25, 4)


def test_the_same_text_scores_a_hundred_and_another_order_less(scorer):
    text = "这条裙子很好看，也很舒服。"
    assert scorer.score(text, text) == dict.fromkeys(METRICS, 100.0)
    turned = scorer.score("裙子红色", "红色裙子")
    assert turned["rouge-1"] == 100.0 and turned["rouge-l"] == 50.0 and turned["rouge-2"] == 0.0


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u3000", "\x1c"])
def test_an_empty_or_blank_text_scores_zero_instead_of_losing_the_run(scorer, blank):
    for pair in ((blank, "参考"), ("预测", blank), (blank, blank)):
        assert scorer.score(*pair) == ZERO


@given(
    st.text(alphabet="裙子很好看红色。！？…”\n 　ab", max_size=30),
    st.text(alphabet="裙子真好看。\n ab", max_size=30),
)
@settings(max_examples=200, deadline=None)
def test_rouge_is_the_librarys_on_any_text(scorer, prediction, reference):
    found = scorer.score(prediction, reference)
    if not prediction.strip() or not reference.strip():
        assert found == ZERO
        return
    cut = [" ".join(scorer.cut(text)) for text in (prediction, reference)]
    theirs = Rouge().get_scores([cut[0]], [cut[1]])[0]
    assert {metric: found[metric] for metric in METRICS[:3]} == {
        metric: round(theirs[metric]["f"] * 100, 4) for metric in METRICS[:3]
    }


@given(st.lists(st.integers(0, 4), max_size=40), st.lists(st.integers(0, 4), max_size=40))
@settings(max_examples=100, deadline=None)
def test_the_bit_parallel_subsequence_is_the_textbooks(left, right):
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
            )
    assert common_subsequence_length(left, right) == table[-1][-1]


def test_the_cache_goes_to_its_own_folder(tmp_path, scorer):
    own = Scorer(tmp_path / "cache")
    assert own.cut("红色裙子") == scorer.cut("红色裙子")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["jieba.cache"]


class Nothing:
    def score(self, prediction, reference):
        return {}


def test_second_opinions_are_sacrebleus_own_corpus_scores():
    random = Random(1)

    def texts():
        lengths = [random.randint(0, 30) for _ in range(80)]
        return ["".join(random.choices("裙子很好看红色。ab 1,", k=length)) for length in lengths]

    predictions, references = texts(), texts()
    rows = [measured(Nothing(), *pair) for pair in zip(predictions, references, strict=True)]
    found = average([row.scores for row in rows], [row.counts for row in rows])
    theirs = {
        "sacrebleu": BLEU(tokenize="zh").corpus_score(predictions, [references]).score,
        "chrf": CHRF().corpus_score(predictions, [references]).score,
    }
    assert {name: found[name]["value"] for name in theirs} == pytest.approx(theirs, abs=1e-3)


def test_length_repetition_and_exact_match_by_hand():
    row = measured(Nothing(), "红裙子红裙子", "红裙子")
    assert row.scores["length-ratio"] == 2.0 and row.counts["length-ratio"] == [6, 3]
    # runs of 4: 红裙子红, 裙子红裙, 子红裙子: none twice
    assert row.scores["repetition"] == 0.0
    assert measured(Nothing(), "好好好好好好", "好").scores["repetition"] == pytest.approx(66.6667)
    assert measured(Nothing(), " 红 ", "红").scores["exact-match"] == 100.0
    assert measured(Nothing(), "红色", "红").scores["exact-match"] == 0.0


def test_a_module_with_one_function_is_a_metric(monkeypatch, tmp_path, caplog):
    (tmp_path / "ends_well.py").write_text(
        "from evaluation.metrics.metric import metric\n"
        "@metric('ends-well', label='Ends well')\n"
        "def ends_well(prediction, reference):\n"
        "    return 100.0 * (prediction[-1] == '。')\n"
    )
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    metrics.known.cache_clear()
    try:
        assert measured(Nothing(), "好。", "好").scores["ends-well"] == 100.0
        broken = measured(Nothing(), "", "好")  # an index out of range
        assert "ends-well" not in broken.scores and "ends-well broke" in caplog.text
        told = average([{"ends-well": 100.0}, {}], [{}, {}])
        assert told == {}  # no number is made up for the row that lacks it
    finally:
        monkeypatch.undo()
        metrics.known.cache_clear()
