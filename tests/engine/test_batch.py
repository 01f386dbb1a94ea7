"""Sequences in a batch: each gets what it gets on its own, bit for bit where products are exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from entrollm import Model, load
from entrollm.engine import decoder as decoder_module
from entrollm.engine.batch import Segment, SequenceStep, passes
from entrollm.engine.cache import Cache
from tests.engine.architectures import random_ids, relative_difference
from tests.engine.dense import load_dense

KINDS = ["llama", "mistral-window", "phi3-longrope", "qwen2-window", "qwen3"]
KINDS += ["gemma2", "gemma3", "cohere2", "ministral3", "gpt_neox", "mixtral", "deepseek_v3"]
RECURRENT = ["qwen3_next", "lfm2", "granite-hybrid-mamba", "nemotron_h"]


@pytest.fixture(scope="module")
def coded(coded_folder: Callable[[str], Path]) -> Callable[[str], Model]:
    """A function from an architecture's name to the model with coded weights."""
    models: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in models:
            models[name] = load(coded_folder(name), threads=2)
        return models[name]

    return get


def last_logits(model: Model, ids: list[int]) -> np.ndarray:
    """The logits after `ids`, from a step with this sequence alone."""
    return model.step([SequenceStep(np.array(ids), model.new_cache())])[0]


@pytest.mark.parametrize("name", [*KINDS, *RECURRENT])
def test_a_batch_gives_each_sequence_its_own_bits(name: str, coded: Callable[[str], Model]) -> None:
    model = coded(name)
    sequences = [random_ids(count, seed=count) for count in (3, 1, 45, 20)]
    caches = [model.new_cache() for _ in sequences]
    alone = [model.new_cache() for _ in sequences]
    position = [0] * len(sequences)
    # Unequal strides: prompts in chunks beside single tokens, and sequences that end early.
    for strides in ([1, 1, 20, 7], [2, 0, 1, 1], [0, 0, 24, 12]):
        steps, expected = [], []
        for i, stride in enumerate(strides):
            if stride:
                ids = np.array(sequences[i][position[i] : position[i] + stride])
                steps.append(SequenceStep(ids, caches[i]))
                expected.append(model.step([SequenceStep(ids, alone[i])])[0])
                position[i] += stride
        np.testing.assert_array_equal(model.step(steps), np.stack(expected))
    assert [cache.ids for cache in caches] == sequences
    for cache, ids in zip(caches, sequences, strict=True):
        assert cache.length == len(ids)


@pytest.mark.parametrize("name", [*KINDS, "gpt2", "gpt_oss"])
def test_a_step_equals_the_logits_of_the_whole_sequence(name: str, checkpoint: Callable[[str], Path]) -> None:
    model = load_dense(checkpoint(name))
    sequences = [random_ids(count, seed=count) for count in (45, 2, 30)]
    found = model.step([SequenceStep(np.array(ids), model.new_cache()) for ids in sequences])
    for row, ids in zip(found, sequences, strict=True):
        assert relative_difference(row, model.logits(ids)[-1]) < 1e-5


def test_steps_longer_than_a_pass(coded: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = coded("mistral-window")
    sequences = [random_ids(count, seed=count) for count in (9, 30, 2)]
    whole = [last_logits(model, ids) for ids in sequences]
    monkeypatch.setattr(decoder_module, "_TOKENS_PER_PASS", 8)
    found = model.step([SequenceStep(np.array(ids), model.new_cache()) for ids in sequences])
    for row, expected in zip(found, whole, strict=True):
        assert relative_difference(row, expected) < 1e-5


def test_passes_cover_all_tokens_in_order(coded: Callable[[str], Model]) -> None:
    cache = coded("llama").new_cache()
    segments = [Segment(i, np.arange(count), cache) for i, count in enumerate((5, 3, 9))]
    cut = list(passes(segments, 4))
    assert [[(part.index, part.ids.tolist()) for part in each] for each in cut] == [
        [(0, [0, 1, 2, 3])],
        [(0, [4]), (1, [0, 1, 2])],
        [(2, [0, 1, 2, 3])],
        [(2, [4, 5, 6, 7])],
        [(2, [8])],
    ]


def test_logits_only_where_they_are_wanted(coded: Callable[[str], Model]) -> None:
    model = coded("llama")
    ids = random_ids(12)
    first, second = model.new_cache(), model.new_cache()
    steps = [SequenceStep(np.array(ids), first, needs_logits=False), SequenceStep(np.array(ids[:5]), second)]
    np.testing.assert_array_equal(model.step(steps), [last_logits(model, ids[:5])])
    assert model.step([SequenceStep(np.array(ids), second, needs_logits=False)]).shape == (0, model.config.vocab_size)
    assert (first.ids, second.ids) == (ids, ids[:5] + ids)


def test_hidden_states_are_those_that_the_logits_come_from(coded: Callable[[str], Model]) -> None:
    model = coded("llama")
    ids, other = random_ids(12), random_ids(5, seed=3)
    seen: dict[int, np.ndarray] = {}
    step = SequenceStep(np.array(ids[:7]), model.new_cache(), observe=seen.__setitem__)
    model.step([SequenceStep(np.array(other), model.new_cache()), step])
    model.step([SequenceStep(np.array(ids[7:]), step.cache, needs_logits=False, observe=seen.__setitem__)])
    assert {start: len(hidden) for start, hidden in seen.items()} == {0: 7, 7: 5}
    found = model.logits_of(np.concatenate([seen[0], seen[7]]))
    np.testing.assert_allclose(found, model.logits(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*KINDS, *RECURRENT])
@pytest.mark.parametrize("length", [1, 7, 39])
def test_a_fork_goes_on_as_the_sequence_would(name: str, length: int, coded: Callable[[str], Model]) -> None:
    model = coded(name)
    ids = random_ids(40)
    cache = model.new_cache()
    model.step([SequenceStep(np.array(ids), cache)])
    other = [*ids[:length], 1 - min(ids[length], 1), *random_ids(6, seed=9)]
    shared = cache.shared(other)
    assert shared in (0, length)
    fork = cache.fork(shared)
    assert fork.ids == ids[:shared]
    # The original is cut to the same beginning, and both go on with the same tokens.
    assert cache.reuse(other) == shared
    rest = np.array(other[shared:])
    np.testing.assert_array_equal(model.step([SequenceStep(rest, fork)])[0], model.step([SequenceStep(rest, cache)])[0])


@pytest.mark.parametrize("name", RECURRENT)
def test_a_state_is_forked_where_the_whole_sequence_is_shared(name: str, coded: Callable[[str], Model]) -> None:
    model = coded(name)
    ids = random_ids(20)
    cache = model.new_cache()
    model.step([SequenceStep(np.array(ids), cache)])
    assert cache.shared([*ids, 3]) == 20
    fork = cache.fork(20)
    steps = [SequenceStep(np.array([3]), fork), SequenceStep(np.array([3, 4]), cache)]
    first, second = model.step(steps)
    assert relative_difference(first, last_logits(model, [*ids, 3])) < 5e-4
    assert relative_difference(second, last_logits(model, [*ids, 3, 4])) < 5e-4


def test_a_fork_has_buffers_of_its_own(coded: Callable[[str], Model]) -> None:
    model = coded("llama")
    ids = random_ids(20)
    cache = model.new_cache()
    model.step([SequenceStep(np.array(ids), cache)])
    fork = cache.fork(10)
    model.step([SequenceStep(np.array(random_ids(30, seed=5)), fork)])
    expected = last_logits(model, [*ids, 7])
    assert relative_difference(model.step([SequenceStep(np.array([7]), cache)])[0], expected) < 1e-5


def test_bad_steps(coded: Callable[[str], Model]) -> None:
    model = coded("llama")
    cache: Cache = model.new_cache()
    with pytest.raises(ValueError, match="at least one sequence"):
        model.step([])
    with pytest.raises(ValueError, match=r"share a cache; give each one of its own, from new_cache\(\)"):
        model.step([SequenceStep(np.array([1]), cache), SequenceStep(np.array([2]), cache)])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model.step([SequenceStep(np.array([10**6]), cache)])
    assert cache.length == 0
