"""When tokens are guessed, and when no longer. That answers stay what they are is in
test_flat_forward.py.
"""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from chat.engine.drafts import PAUSE, TOKENS, Drafter
from chat.engine.engine import Engine, EngineConfig
from chat.engine.flat_steps import FlatSteps
from chat.ops import cpu_kernels
from tests.support.tiny_models import greedy, loaded_model, random_prompt


def attempts(rows, tokens, right):
    """(token, guess) of each attempt in an answer of `tokens` tokens. right(token): how many tokens
    of a guess made there come true.
    """
    draw = random.Random(1)
    drafter = Drafter([draw.randrange(3) for _ in range(60)])  # each pair stands somewhere
    made, at = [], 0
    while at < tokens:
        guess = drafter.guess(rows, 1000)
        true = min(right(at), len(guess))
        if guess:
            made.append((at, guess))
            drafter.came_true(len(guess), true)
        said = [*guess[:true], draw.randrange(3)]
        drafter.take(said)
        at += len(said)
    return made


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_guesses_that_do_not_come_true_are_made_ever_more_rarely(rows):
    places = [at for at, _ in attempts(rows, 2000, lambda at: 0)]
    pauses = [b - a for a, b in pairwise(places) if b - a > 4]
    assert len(places) < 20 and pauses[0] >= PAUSE
    assert all(after >= 1.9 * before for before, after in pairwise(pauses))


def test_guesses_that_come_true_again_are_made_at_once_again():
    made = attempts(2, 3000, lambda at: TOKENS if at > 1000 else 0)
    assert sum(at > 1500 for at, _ in made) > 200
    early = [at for at, _ in made if at < 1000]
    assert len(early) < 12


def test_in_a_large_batch_only_a_resembling_text_is_guessed():
    assert Drafter([1, 2, 3, 1, 2]).guess(5, 10) == []
    assert Drafter([1, 2, 3, 1, 2]).guess(4, 10) == [3, 1, 2]
    drafter = Drafter([1, 2], [7, 8, 9, 10, 11, 12])
    assert drafter.guess(32, 10) == [7, 8, 9, 10]
    assert drafter.guess(32, 2) == [7, 8] and drafter.guess(32, 0) == []
    drafter.came_true(4, 1)
    drafter.take([7, 5])  # and then something else
    assert drafter.guess(32, 10) == []
    assert Drafter([1, 2], [7, 8, 9], trust=0.3).guess(32, 10) == []  # nor do others' come true


def test_an_engine_learns_that_its_guesses_do_not_come_true(monkeypatch):
    if cpu_kernels.load(torch.float32) is None:
        pytest.skip("no C++ compiler")
    prompter, draw, guessed = loaded_model("qwen3").prompter, random.Random(5), {}
    check = FlatSteps.check

    def counted(self, rows, guesses):
        for row, guess in zip(rows, guesses, strict=True):
            guessed[row.id] = guessed.get(row.id, 0) + len(guess)
        return check(self, rows, guesses)

    monkeypatch.setattr(FlatSteps, "check", counted)
    asks = [greedy(str(n), random_prompt("qwen3", draw), 12) for n in range(40)]
    config = EngineConfig(max_rows=8, drafts=False)
    answers = Engine(loaded_model("qwen3"), config).generate(asks)
    # as each answer for two tokens, and then something else
    told = {answer.id: [*answer.token_ids[:2], *[5, 6] * 9] for answer in answers}
    monkeypatch.setattr(prompter, "response_ids", told.__getitem__)
    engine = Engine(loaded_model("qwen3"), EngineConfig(max_rows=8))
    engine.generate(replace(ask, resembles=ask.id) for ask in asks)
    counts = [guessed.get(str(n), 0) for n in range(40)]
    assert sum(counts[:8]) >= 8 and sum(counts[-16:]) == 0
