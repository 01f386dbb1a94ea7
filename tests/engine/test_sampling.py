"""Sampling against transformers' logits processors, and its own promises."""

import itertools

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from entrollm.engine.sampling import Sampler, SamplingOptions, candidates, token_logprobs
from entrollm.engine.weights import Floats
from entrollm.errors import FormatError

VOCAB_SIZE = 200


def random_logits(seed: int) -> Floats:
    return np.random.default_rng(seed).normal(0, 3, VOCAB_SIZE).astype(np.float32)


def transformers_probabilities(logits: Floats, options: SamplingOptions) -> Floats:
    processors = LogitsProcessorList([TemperatureLogitsWarper(options.temperature)])
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        processors.append(MinPLogitsWarper(options.min_p))
    scores = processors(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits.copy())[None])
    probabilities: Floats = scores.softmax(-1)[0].numpy()
    return probabilities


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    list(itertools.product((0.5, 1.0, 1.7), (0, 1, 12, 500), (1.0, 0.9, 0.3), (0.0, 0.05, 0.5))),
)
def test_candidates_equal_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(top_k)
    ids, probabilities = candidates(logits, options)
    dense = np.zeros(VOCAB_SIZE)
    dense[ids] = probabilities
    expected = transformers_probabilities(logits, options)
    assert set(ids.tolist()) == set(np.flatnonzero(expected).tolist())
    np.testing.assert_allclose(dense, expected, atol=1e-6)


def test_top_p_zero_and_min_p_one_keep_the_likeliest() -> None:
    logits = random_logits(1)
    for options in (SamplingOptions(temperature=1.0, top_p=0.0), SamplingOptions(temperature=1.0, min_p=1.0)):
        ids, probabilities = candidates(logits, options)
        assert ids.tolist() == [logits.argmax()]
        assert probabilities.tolist() == [1.0]


def test_repetition_penalty_equals_transformers() -> None:
    """Greedy choices follow the penalised logits; used tokens are those of the prompt and those chosen."""
    logits = random_logits(2)
    used = [3, 3, 17, int(logits.argmax())]
    sampler = Sampler(SamplingOptions(repetition_penalty=1.8), VOCAB_SIZE, used)
    processor = RepetitionPenaltyLogitsProcessor(1.8)
    for _ in range(20):
        scores = processor(torch.tensor([used]), torch.from_numpy(logits.copy())[None])
        token = sampler(logits)
        assert token == int(scores.argmax())
        used.append(token)
    assert len(set(used)) > 4


def test_samples_follow_the_distribution() -> None:
    logits = random_logits(3)
    options = SamplingOptions(temperature=1.0, top_k=5, seed=11)
    sampler = Sampler(options, VOCAB_SIZE, [])
    counts = np.bincount([sampler(logits) for _ in range(20000)], minlength=VOCAB_SIZE) / 20000
    ids, probabilities = candidates(logits, options)
    assert counts[ids].sum() == pytest.approx(1.0)
    np.testing.assert_allclose(counts[ids], probabilities, atol=0.015)


def test_a_seed_makes_choices_reproducible() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.5, seed=seed), VOCAB_SIZE, [])
        return [sampler(random_logits(step)) for step in range(30)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_temperature_zero_is_greedy_whatever_the_filters() -> None:
    logits = random_logits(4)
    assert Sampler(SamplingOptions(top_k=3, top_p=0.5, seed=1), VOCAB_SIZE, [])(logits) == logits.argmax()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature should be from 0 to 100, got -1.0"),
        ({"temperature": float("nan")}, "temperature should be from 0 to 100, got nan"),
        ({"temperature": 1e-4}, "temperature should be 0 or at least 0.001"),
        ({"top_k": -1}, "top_k should be from 0"),
        ({"top_p": 1.5}, "top_p should be from 0 to 1, got 1.5"),
        ({"min_p": -0.1}, "min_p should be from 0 to 1, got -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty should be from 0.01 to 100, got 0.0"),
        ({"seed": -3}, "seed should be at least 0, got -3"),
        ({"presence_penalty": 101.0}, "presence_penalty should be from -100 to 100, got 101.0"),
        ({"frequency_penalty": -101.0}, "frequency_penalty should be from -100 to 100, got -101.0"),
        (
            {"logit_bias": {3: 1e9}},
            "logit_bias should map token ids to numbers from -1000 to 1000, got 3: 1000000000.0",
        ),
        ({"logit_bias": {-3: 1.0}}, "logit_bias should map token ids to numbers"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)  # type: ignore[arg-type]


def test_penalties_count_the_answer_alone() -> None:
    """Greedy choices follow logits minus presence and frequency penalties; the prompt does not count."""
    logits = random_logits(6)
    prompt = [int(logits.argmax())]
    sampler = Sampler(SamplingOptions(presence_penalty=0.9, frequency_penalty=0.4), VOCAB_SIZE, prompt)
    counts = np.zeros(VOCAB_SIZE)
    for _ in range(40):
        expected = int((logits - 0.9 * (counts > 0) - 0.4 * counts).argmax())
        assert sampler(logits) == expected
        counts[expected] += 1
    assert counts[prompt[0]] > 1
    assert np.count_nonzero(counts) > 4


def test_logit_bias_is_added() -> None:
    logits = random_logits(7)
    top, low = int(logits.argmax()), int(logits.argmin())
    assert Sampler(SamplingOptions(logit_bias={top: -100.0}), VOCAB_SIZE, [])(logits) == np.argsort(logits)[-2]
    assert Sampler(SamplingOptions(temperature=1.0, seed=1, logit_bias={low: 100}), VOCAB_SIZE, [])(logits) == low
    assert logits[top] == random_logits(7)[top]  # the caller's logits stay
    with pytest.raises(ValueError, match="logit_bias names token 200, which is outside the vocabulary of 200"):
        Sampler(SamplingOptions(logit_bias={VOCAB_SIZE: 1.0}), VOCAB_SIZE, [])


def test_no_token_left() -> None:
    sampler = Sampler(SamplingOptions(), 3, [])
    with pytest.raises(ValueError, match="no token is allowed here"):
        sampler(np.zeros(3, dtype=np.float32), banned=(0, 1, 2))


def test_logprobs_equal_log_softmax() -> None:
    logits = random_logits(8)
    expected = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    found = token_logprobs(logits, 17, 5)
    assert found.token == 17
    assert found.logprob == pytest.approx(expected[17], abs=1e-6)
    order = np.argsort(expected)[::-1][:5]
    assert [token for token, _ in found.top] == order.tolist()
    np.testing.assert_allclose([logprob for _, logprob in found.top], expected[order], atol=1e-6)
    assert token_logprobs(logits, 3, 0).top == ()
    assert len(token_logprobs(logits, 3, VOCAB_SIZE + 9).top) == VOCAB_SIZE


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits(value: float, temperature: float) -> None:
    logits = random_logits(5)
    logits[7] = value
    with pytest.raises(FormatError, match="logits are not finite"):
        Sampler(SamplingOptions(temperature=temperature), VOCAB_SIZE, [])(logits)
