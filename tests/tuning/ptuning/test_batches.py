"""Which examples a step reads, how they are grouped, and what each token weighs."""

import random

import pytest
import torch

from chat.engine.prompts import IGNORED
from tests.support import tiny_training as tiny
from tuning.datasets.examples import messages_of
from tuning.ptuning.batches import (
    MicroBatch,
    group_by_length,
    rows_of_step,
    token_weights,
)
from tuning.ptuning.encoded import Encoded


def test_every_epoch_reads_each_example_once_in_an_order_of_its_own():
    steps = [rows_of_step(step, 4, 10, seed=3) for step in range(5)]
    read = [row for step in steps for row in step]
    assert sorted(read[:10]) == sorted(read[10:]) == list(range(10))
    assert read[:10] != read[10:]
    assert steps == [rows_of_step(step, 4, 10, seed=3) for step in range(5)]
    assert steps != [rows_of_step(step, 4, 10, seed=4) for step in range(5)]


def test_a_step_larger_than_the_data_reads_several_epochs():
    assert sorted(rows_of_step(0, 7, 3, seed=0)) in (
        [0, 0, 0, 1, 1, 2, 2],
        [0, 0, 1, 1, 1, 2, 2],
        [0, 0, 1, 1, 2, 2, 2],
    )


def test_groups_hold_every_row_once_and_stay_within_the_limit():
    lengths = [3, 60, 5, 61, 4, 50, 200]
    groups = group_by_length(lengths, max_tokens=130, overhead=10)
    assert sorted(row for group in groups for row in group) == list(range(7))
    assert [6] in groups  # longer than the limit: alone
    assert all(
        len(group) == 1 or len(group) * max(lengths[row] for row in group) <= 130
        for group in groups
    )
    assert {frozenset(group) for group in groups} == {
        frozenset({6}),
        frozenset({1, 3}),
        frozenset({5}),
        frozenset({0, 2, 4}),
    }


def cheapest(lengths: list[int], max_tokens: int, overhead: int) -> int:
    """By trying every way to cut the sorted lengths."""
    longest = sorted(lengths, reverse=True)

    def cost(end: int) -> int:
        if not end:
            return 0
        begins = [
            begin
            for begin in range(end)
            if end - begin == 1 or (end - begin) * longest[begin] <= max_tokens
        ]
        return min(cost(begin) + overhead + (end - begin) * longest[begin] for begin in begins)

    return cost(len(lengths))


def test_no_other_split_costs_less():
    draw = random.Random(0)
    for _ in range(60):
        lengths = [draw.randint(1, 30) for _ in range(draw.randint(1, 7))]
        max_tokens, overhead = draw.randint(20, 80), draw.randint(0, 20)
        groups = group_by_length(lengths, max_tokens, overhead)
        cost = sum(overhead + len(group) * max(lengths[row] for row in group) for group in groups)
        assert cost == cheapest(lengths, max_tokens, overhead), (lengths, max_tokens, overhead)


def test_equal_lengths_make_one_group_and_an_expensive_micro_batch_joins_unequal_ones():
    assert group_by_length([7] * 16, max_tokens=1000, overhead=1) == [list(range(16))]
    assert len(group_by_length([10, 100], max_tokens=1000, overhead=0)) == 2
    assert len(group_by_length([10, 100], max_tokens=1000, overhead=500)) == 1


def test_weights_are_the_mean_over_a_batch_then_over_batches():
    labels = [[IGNORED, 1, 2], [IGNORED, IGNORED, 1], [1, 1, 1, 1], [IGNORED, 2]]
    # shifted by one: 2, 1, 3 and 1 labels
    assert token_weights(labels, 1) == pytest.approx([1 / 8, 1 / 4, 1 / 12, 1 / 4])
    assert token_weights(labels, 2) == pytest.approx([1 / 6, 1 / 6, 1 / 8, 1 / 8])
    assert token_weights(labels, 4) == pytest.approx([1 / 7] * 4)


def test_a_micro_batch_says_which_state_predicts_which_token():
    rows = [([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8]), ([9, 4], [IGNORED, 4])]
    batch = MicroBatch.of(rows, [0.5, 0.25], pad_id=1, device=torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 4, 1, 1]]
    assert batch.positions.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [7, 8, 4]
    assert batch.weights.tolist() == [0.5, 0.5, 0.25]


def test_history_becomes_turns_and_blank_rows_are_left_out():
    row = {"prompt": "c", "response": "d", "history": [["a", "b"]]}
    assert messages_of("c", row["history"]) == (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    )
    rows = [{**row, "response": "  "}, row, {**row, "prompt": ""}]
    encoded = Encoded(rows, tiny.loaded().prompter, 32, 16)
    assert len(encoded) == 1
    ids, labels = encoded[0]
    answer = [label for label in labels if label != IGNORED]
    assert tiny.tokenizer().decode(answer) == "d<|end|>" and ids[-len(answer) :] == answer
