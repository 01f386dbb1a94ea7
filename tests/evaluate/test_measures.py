"""Perplexity and divergence against slow definitions, and the pass over a text."""

import math
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from entrollm.errors import EntroLLMError
from entrollm.evaluate import Evaluation, Windows, evaluate, evaluate_in_turn, evaluation
from entrollm.evaluate import perplexity as perplexity_module
from entrollm.evaluate.divergence import token_divergences, top1_agreements
from entrollm.evaluate.perplexity import standard_error, summarize_losses, token_losses

VOCABULARY = 7
logit_rows = arrays(np.float32, (5, VOCABULARY), elements=st.floats(-80, 80, width=32))


class TableModel:
    """Gives every token the logits of its row of a table, and remembers what it read."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table.astype(np.float32)
        self.reads: list[list[int]] = []

    def logits(self, ids: np.ndarray, /) -> np.ndarray:
        self.reads.append(ids.tolist())
        return self.table[ids]


def windows_of(ids: list[list[int]], text_tokens: int = 10, text_bytes: int = 40) -> Windows:
    return Windows(np.array(ids, np.int64), text_tokens, text_bytes)


def random_model(seed: int, vocabulary: int = VOCABULARY) -> TableModel:
    return TableModel(np.random.default_rng(seed).standard_normal((VOCABULARY, vocabulary)))


def softmax(row: np.ndarray) -> list[float]:
    exact = [math.exp(float(value) - float(max(row))) for value in row]
    return [value / math.fsum(exact) for value in exact]


@given(logit_rows, st.lists(st.integers(0, VOCABULARY - 1), min_size=5, max_size=5))
def test_losses_are_minus_log_softmax(logits: np.ndarray, targets: list[int]) -> None:
    found = token_losses(logits, np.array(targets))
    for row, target, loss in zip(logits, targets, found, strict=True):
        maximum = float(max(row))
        log_sum = math.log(math.fsum(math.exp(float(value) - maximum) for value in row))
        assert loss == pytest.approx(maximum + log_sum - float(row[target]), rel=1e-12, abs=1e-12)


@given(logit_rows, logit_rows)
def test_divergences_are_the_definition(reference: np.ndarray, model: np.ndarray) -> None:
    found = token_divergences(reference, model)
    for wanted_row, model_row, divergence in zip(reference, model, found, strict=True):
        p, q = softmax(wanted_row), softmax(model_row)
        expected = math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        assert divergence == pytest.approx(max(expected, 0.0), rel=1e-9, abs=1e-11)


@given(logit_rows)
def test_a_model_does_not_diverge_from_itself(logits: np.ndarray) -> None:
    assert token_divergences(logits, logits).tolist() == [0.0] * 5
    assert top1_agreements(logits, logits).all()


def test_small_pieces_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    first, second = generator.standard_normal((2, 11, 30)).astype(np.float32)
    targets = generator.integers(0, 30, 11)
    whole = token_losses(first, targets), token_divergences(first, second)
    monkeypatch.setattr(perplexity_module, "_PIECE_ELEMENTS", 90)
    assert len(list(perplexity_module.pieces(first))) == 4
    np.testing.assert_array_equal(token_losses(first, targets), whole[0])
    np.testing.assert_array_equal(token_divergences(first, second), whole[1])


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    (result,), reference = evaluate(
        [TableModel(np.zeros((VOCABULARY, VOCABULARY)))], windows_of([[0, 1, 2], [3, 4, 5]])
    )
    assert reference is None
    assert result.divergence is None
    assert result.perplexity.perplexity == pytest.approx(VOCABULARY)
    assert result.perplexity.nats_per_token == pytest.approx(math.log(VOCABULARY))
    assert result.perplexity.bits_per_byte == pytest.approx(math.log2(VOCABULARY) * 10 / 40)
    assert (result.perplexity.windows, result.perplexity.predictions) == (2, 4)


def test_every_token_predicts_its_successor_within_the_window() -> None:
    certain = np.full((VOCABULARY, VOCABULARY), -1000.0)
    for token in range(VOCABULARY):
        certain[token, (token + 1) % VOCABULARY] = 0
    (result,), _ = evaluate([TableModel(certain)], windows_of([[0, 1, 2], [5, 6, 0]]))
    assert result.perplexity.perplexity == 1.0


def test_one_pass_gives_what_separate_passes_give() -> None:
    windows = windows_of([[0, 1, 2, 3], [4, 5, 6, 0], [1, 3, 5, 2]])
    reference, first, second = (random_model(seed) for seed in range(3))
    both, reference_result = evaluate([first, second], windows, reference)
    assert len(reference.reads) == 3
    assert both[0] == evaluate([random_model(1)], windows, random_model(0))[0][0]
    assert both[1] == evaluate([random_model(2)], windows, random_model(0))[0][0]
    assert reference_result == evaluate([random_model(0)], windows)[0][0]


def test_the_divergence_is_of_the_model_from_the_reference() -> None:
    windows = windows_of([[0, 1, 2], [3, 4, 5]])
    reference, model = random_model(0), random_model(1)
    divergence = evaluate([model], windows, reference)[0][0].divergence
    assert divergence is not None
    used = np.array([0, 1, 3, 4])
    expected = token_divergences(reference.table[used], model.table[used])
    assert divergence.mean == pytest.approx(expected.mean())
    assert divergence.maximum == pytest.approx(expected.max())
    assert divergence.percentile_99 == pytest.approx(np.percentile(expected, 99))
    agreed = reference.table[used].argmax(axis=1) == model.table[used].argmax(axis=1)
    assert divergence.top1_agreement == agreed.mean()


def test_the_standard_error_is_of_the_means_of_windows() -> None:
    losses = np.array([[1.0, 3.0], [2.0, 6.0], [3.0, 3.0]])
    assert standard_error(losses) == pytest.approx(np.std([2, 4, 3], ddof=1) / math.sqrt(3))
    assert standard_error(losses[:1]) is None


def test_a_hopeless_model_has_infinite_perplexity_not_an_overflow() -> None:
    assert summarize_losses(np.full((1, 2), 1000.0), 1, 1).perplexity == math.inf


def test_results_become_json() -> None:
    windows = windows_of([[0, 1, 2], [3, 4, 5]])
    (alone,), _ = evaluate([random_model(1)], windows)
    assert "kl" not in alone.to_json()
    result: Evaluation = evaluate([random_model(1)], windows, random_model(0))[0][0]
    found = result.to_json()
    assert found["perplexity"] == result.perplexity.perplexity
    assert result.divergence is not None
    assert found["kl"]["mean"] == result.divergence.mean


def test_progress_counts_tokens() -> None:
    calls: list[tuple[float, float]] = []
    evaluate(
        [random_model(0)], windows_of([[0, 1, 2], [3, 4, 5]]), progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(3, 6), (6, 6)]


def test_different_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="the reference has a vocabulary of 9 and the model one of 7"):
        evaluate([random_model(0)], windows_of([[0, 1, 2]]), random_model(1, vocabulary=9))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    model = random_model(0)
    model.table[4, 2] = bad
    with pytest.raises(EntroLLMError, match="window 1: the model's logits are not finite"):
        evaluate([model], windows_of([[0, 1, 2], [3, 4, 5]]))


@pytest.mark.parametrize("kept_bytes", [1, 10**9])
def test_models_in_turn_have_the_same_figures_and_one_is_in_memory(
    kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "KEPT_BYTES", kept_bytes)
    windows = windows_of([[0, 1, 2, 3], [3, 1, 0, 2], [2, 2, 2, 2]])
    alive: weakref.WeakSet[TableModel] = weakref.WeakSet()
    loads = []

    def load(number: int) -> TableModel:
        assert not alive
        loads.append(number)
        model = random_model(number)
        alive.add(model)
        return model

    seen: list[tuple[float, float]] = []
    found = evaluate_in_turn(
        [lambda number=number: load(number) for number in (1, 2)],  # type: ignore[misc]
        windows,
        random_model(0),
        lambda done, total: seen.append((done, total)),
    )
    assert found == evaluate([random_model(1), random_model(2)], windows, random_model(0))
    assert loads == [1, 2] * (3 if kept_bytes == 1 else 1)
    assert [done for done, _ in seen] == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0] and seen[-1] == (12.0, 12)
    assert evaluate_in_turn([lambda: random_model(1)], windows) == evaluate([random_model(1)], windows)
