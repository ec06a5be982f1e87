"""The sampler against transformers' own logits processors."""

import math
from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chat.engine.request import SamplingParams
from chat.engine.sampler import SamplerState, sample

VOCABULARY = 40


def theirs(logits, ids, sampling):
    """Probabilities that transformers' generate would draw from."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(min(sampling.top_k, VOCABULARY)))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors(torch.tensor([ids]), logits[None].clone())[0].softmax(-1)


CASES = [
    SamplingParams(),
    SamplingParams(temperature=1.5, top_p=1.0, top_k=0),
    SamplingParams(temperature=0.7, top_p=0.5, top_k=0),
    SamplingParams(temperature=1.0, top_p=1.0, top_k=5),
    SamplingParams(temperature=1.2, top_p=0.8, top_k=7, repetition_penalty=1.6),
    SamplingParams(temperature=1.0, top_p=0.01, top_k=1000),
]


def test_draws_follow_the_distribution_of_transformers_for_every_row_of_a_mixed_batch():
    torch.manual_seed(0)
    logits = torch.randn(len(CASES), VOCABULARY) * 2
    ids = [1, 5, 5, 9, 30]
    draws = 3000
    rows = [SamplerState.of(sampling, ids) for sampling in CASES]
    for number, row in enumerate(rows):
        row.draws.seed(number)
    counts = [Counter() for _ in CASES]
    for _ in range(draws):
        for count, chosen in zip(counts, sample(logits.clone(), rows), strict=True):
            count[chosen.token] += 1
    for count, row, sampling in zip(counts, logits, CASES, strict=True):
        probabilities = theirs(row, ids, sampling)
        assert set(count) <= set(probabilities.nonzero().flatten().tolist())
        for token, probability in enumerate(probabilities.tolist()):
            spread = 5 * math.sqrt(draws * probability * (1 - probability)) + 3
            assert abs(count[token] - draws * probability) < spread, (sampling, token)


def test_a_row_draws_the_same_alone_and_in_company():
    torch.manual_seed(1)
    logits = torch.randn(len(CASES), VOCABULARY)
    together = [SamplerState.of(sampling, []) for sampling in CASES]
    alone = [SamplerState.of(sampling, []) for sampling in CASES]
    for number, (one, other) in enumerate(zip(together, alone, strict=True)):
        one.draws.seed(number)
        other.draws.seed(number)
    for _ in range(50):
        company = [chosen.token for chosen in sample(logits.clone(), together)]
        single = [sample(logits[i : i + 1].clone(), [row])[0].token for i, row in enumerate(alone)]
        assert company == single


def test_greedy_rows_take_the_best_after_the_repetition_penalty():
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 3], logits[:, 7] = 2.0, 1.9
    rows = [
        SamplerState.of(SamplingParams(do_sample=False), [3]),
        SamplerState.of(SamplingParams(do_sample=False, repetition_penalty=1.2), [3]),
    ]
    assert [chosen.token for chosen in sample(logits, rows)] == [3, 7]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [SamplingParams(do_sample=False), SamplingParams(seed=1)])
def test_a_row_that_is_not_finite_is_told_apart(bad, sampling):
    logits = torch.zeros(3, VOCABULARY)
    logits[1, 4] = bad
    logits[:, 9] = 5.0
    chosen = sample(logits, [SamplerState.of(sampling, []) for _ in range(3)])
    assert chosen[1].token is None
    assert chosen[0].token is not None and chosen[2].token is not None


def test_logprobs_are_the_models_own_before_any_filter():
    torch.manual_seed(2)
    logits = torch.randn(2, VOCABULARY)
    expected = logits.log_softmax(-1)
    rows = [
        SamplerState.of(SamplingParams(seed=1, temperature=0.1, logprobs=2), []),
        SamplerState.of(SamplingParams(seed=2), []),
    ]
    reported, silent = sample(logits.clone(), rows)
    assert silent.logprobs is None
    assert [token for token, _ in reported.logprobs[1:]] == expected[0].topk(2).indices.tolist()
    for token, logprob in reported.logprobs:
        assert logprob == pytest.approx(expected[0, token].item(), abs=1e-5)


def plainly(logits, sampling, prompt, answer):
    """OpenAI's formulas, number by number: the scores from which a token is chosen."""
    scores = [float(value) for value in logits]
    for token in set(prompt) | set(answer):
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    for token in range(len(scores)):
        count = answer.count(token)
        scores[token] -= count * sampling.frequency_penalty
        scores[token] -= (count > 0) * sampling.presence_penalty
    return scores


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(presence_penalty=1.3),
        SamplingParams(frequency_penalty=0.7),
        SamplingParams(presence_penalty=-1.1, frequency_penalty=2, repetition_penalty=1.4),
        SamplingParams(logit_bias=((3, 5.0), (5, -100.0), (39, 0.5)), frequency_penalty=-0.2),
    ],
)
def test_penalties_and_biases_are_openais_formulas(sampling):
    torch.manual_seed(1)
    prompt, answer = [1, 5, 9], [5, 5, 7, 30]
    row = SamplerState.of(sampling, prompt)
    for token in answer:
        row.take(token)
    logits = torch.randn(1, VOCABULARY)
    expected = plainly(logits[0], sampling, prompt, answer)
    adjusted = logits.clone()
    sample(adjusted, [row])
    assert adjusted[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_bias_bans_a_token_or_forces_it_also_where_nothing_is_drawn():
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 4] = 9.0
    ban = SamplingParams(do_sample=False, logit_bias=((4, -100.0),))
    force = SamplingParams(logit_bias=((7, 100.0),))
    banned, forced = sample(logits, [SamplerState.of(ban, []), SamplerState.of(force, [])])
    assert banned.token != 4 and forced.token == 7
