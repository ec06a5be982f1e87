"""Means and their bootstrap intervals."""

import numpy as np
import pytest

from evaluation.intervals import METRICS, average, difference, holm


def scores(values) -> list[dict]:
    return [dict.fromkeys(METRICS, float(value)) for value in values]


def test_the_value_is_the_plain_mean_and_the_interval_holds_it():
    found = average(scores([10, 20, 60]))["rouge-l"]
    assert found["value"] == 30.0 and 10 <= found["low"] < 30 < found["high"] <= 60


def test_the_interval_is_as_wide_as_the_textbooks():
    random = np.random.default_rng(1)
    values = random.normal(50, 10, 400)
    found = average(scores(values))["bleu-4"]
    half = 1.96 * values.std(ddof=1) / 20
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.1)


def test_intervals_are_reproducible_and_constant_scores_have_none():
    values = scores(np.random.default_rng(2).uniform(0, 100, 50))
    assert average(values, seed=3) == average(values, seed=3) != average(values, seed=4)
    assert average(scores([7] * 5))["rouge-1"] == {"value": 7.0, "low": 7.0, "high": 7.0}
    assert average([]) == {}  # no number is made up


def test_one_row_has_a_score_and_no_interval():
    assert average(scores([7]))["rouge-1"] == {"value": 7.0, "low": None, "high": None}
    told = difference(scores([7]), scores([5]))["rouge-1"]
    assert told == {"value": 2.0, "low": None, "high": None, "p": None}


def test_a_paired_difference_sees_what_two_separate_intervals_cannot():
    random = np.random.default_rng(5)
    base = random.uniform(0, 100, 200)  # rows differ wildly; tuning adds 2 to each, more or less
    tuned = base + random.normal(2, 1, 200)
    ours, theirs = average(scores(tuned))["rouge-1"], average(scores(base))["rouge-1"]
    assert ours["low"] < theirs["high"]  # overlapping: no verdict
    gain = difference(scores(tuned), scores(base))["rouge-1"]
    assert 1.5 < gain["low"] < gain["value"] < gain["high"] < 2.5


def test_without_a_difference_the_interval_holds_zero_about_as_often_as_it_says():
    random = np.random.default_rng(6)
    alarms = 0
    for seed in range(100):
        base = random.uniform(0, 100, 60)
        found = difference(scores(base + random.normal(0, 5, 60)), scores(base), seed=seed)[
            "rouge-1"
        ]
        alarms += not found["low"] <= 0 <= found["high"]
    assert alarms <= 14  # 5 % promised; 15 or more would come by chance once in 5,000 times


def test_rows_must_pair():
    with pytest.raises(ValueError, match="2 rows"):
        difference(scores([1, 2]), scores([1]))


def test_holm_is_the_textbooks_and_keeps_false_alarms_at_five_percent():
    assert holm([0.01, 0.04, 0.03, 0.005]) == [0.03, 0.06, 0.06, 0.02]
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.9, 0.8]) == [1.0, 1.0]
    random = np.random.default_rng(7)
    families = 0
    for seed in range(60):  # 8 adapters that are no better than the base
        base = scores(random.uniform(0, 100, 40))
        ps = []
        for _ in range(8):
            ours = scores([row["rouge-1"] + random.normal(0, 5) for row in base])
            ps.append(difference(ours, base, seed=seed)["rouge-1"]["p"])
        families += min(holm(ps)) <= 0.05
    assert families <= 10  # 5 % promised; the uncorrected alarm is in every third family


def test_metrics_of_all_rows_are_combined_on_each_draw():
    counts = [{"perplexity": [float(nats), 10]} for nats in (10, 20, 30, 40)]
    found = average([{}] * 4, counts)["perplexity"]
    assert found["value"] == pytest.approx(np.exp(2.5), abs=1e-4)
    assert np.exp(1) < found["low"] < found["value"] < found["high"] < np.exp(4)
    again = [{"perplexity": [row["perplexity"][0] - 1, 10]} for row in counts]
    told = difference([{}] * 4, [{}] * 4, again, counts)["perplexity"]
    assert told["value"] < 0 and told["high"] < 0
