"""Caches in half precision and in integers: the same attention but for what their rounding does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from entrollm import Model, UnsupportedError, _core, load
from entrollm.engine.batch import SequenceStep
from entrollm.engine.cache import cache_bytes_per_token
from entrollm.engine.layer_cache import CacheType, LayerCache, Positions
from entrollm.engine.weights import Floats
from tests.engine.architectures import random_ids, relative_difference
from tests.engine.dense import load_dense
from tests.support import reference_ops as reference
from tests.support.isa_workers import InstructionSets
from tests.support.paths import TINY_LLAMA

# The largest relative error of mixed values.
ERRORS: dict[CacheType, float] = {"f32": 1e-6, "f16": 3e-3, "int8": 5e-2}


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mixed(queries: Floats, positions: Positions, threads: int = 1) -> Floats:
    return _core.attention(queries, *positions[1:4], _core.ThreadPool(threads), positions.scales)


@pytest.mark.parametrize("cache_type", ERRORS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"), [(8, 1, 64, None), (6, 2, 24, 40), (2, 2, 5, None)]
)
def test_attention_over_rounded_keys_and_values(
    cache_type: CacheType, heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    tokens = 300
    queries, keys, values = (
        normal(seed, tokens, count, head_dim) for seed, count in enumerate((heads, kv_heads, kv_heads))
    )
    keys[:, :, 1] += 4  # a feature that is large everywhere, as models have
    cache = LayerCache(kv_heads, head_dim, window, cache_type=cache_type)
    exact = LayerCache(kv_heads, head_dim, window)
    for begin, end in ((0, 290), (290, 299), (299, 300)):
        found = mixed(queries[begin:end], cache.append(keys[begin:end], values[begin:end]))
        expected = mixed(queries[begin:end], exact.append(keys[begin:end], values[begin:end]))
        assert relative_difference(found, expected) <= ERRORS[cache_type]
    if cache_type == "f16":
        positions = cache.append(keys[:1], values[:1])
        assert positions.keys.dtype == np.float16
        rounded = positions._replace(keys=positions.floats()[0], values=positions.floats()[1])
        np.testing.assert_array_equal(mixed(queries[:1], positions), mixed(queries[:1], rounded))


def hadamard(size: int) -> Floats:
    """The orthonormal matrix that mixes `size` features: one for each run of the largest power of two."""
    matrix = np.ones((1, 1))
    while size % (2 * len(matrix)) == 0:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(size // len(matrix)), matrix / len(matrix) ** 0.5).astype(np.float32)


def mixed_in_floats(queries: Floats, positions: Positions) -> Floats:
    """Attention over the floats that the integers stand for."""
    assert positions.scales is not None
    key_scales, value_scales = positions.scales
    keys, values = positions.keys * key_scales[:, None], positions.values * value_scales[:, :, None]
    matrix = hadamard(queries.shape[-1])
    found = reference.attention(queries @ matrix, keys, values, positions.window)
    return np.asarray((found.reshape(queries.shape) @ matrix).reshape(found.shape), np.float32)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"), [(8, 1, 64, None), (6, 2, 24, 40), (2, 2, 5, None), (1, 1, 1100, 7)]
)
def test_products_of_integers_are_those_of_their_floats(
    heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    queries, keys, values = (normal(seed, 600, n, head_dim) for seed, n in enumerate((heads, kv_heads, kv_heads)))
    cache = LayerCache(kv_heads, head_dim, window, cache_type="int8")
    for begin, end in ((0, 590), (590, 599), (599, 600)):
        positions = cache.append(keys[begin:end], values[begin:end])
        found = mixed(queries[begin:end], positions)
        assert relative_difference(found, mixed_in_floats(queries[begin:end], positions)) <= 3e-4


def test_small_weights_beside_a_large_one_count() -> None:
    keys, values = normal(1, 4000, 1, 64) * np.float32(0.1), np.ones((4000, 1, 64), np.float32)
    queries = np.ones((1, 1, 64), np.float32)
    keys[0], values[0] = 1.5, 0  # 12 above the other scores
    positions = LayerCache(1, 64, None, cache_type="int8").append(keys, values)
    expected = mixed_in_floats(queries, positions)[0, 0]
    assert 0.01 < expected < 0.05
    # Weights beside the large one, in its block of 256 positions, are below a step of 1 / 32767.
    assert abs(mixed(queries, positions)[0, 0] - expected) < 256 / 32767 / 2


def test_queries_that_are_not_finite_give_nan() -> None:
    positions = LayerCache(1, 8, None, cache_type="int8").append(normal(1, 20, 1, 8), normal(2, 20, 1, 8))
    for value in (np.nan, np.inf):
        queries = normal(3, 1, 2, 8)
        queries[0, 1, 3] = value
        found = mixed(queries, positions)
        assert np.isfinite(found[0, :8]).all() and np.isnan(found[0, 8:]).all()


def _mixed_by(cache_type: CacheType, queries: Floats, keys: Floats, values: Floats) -> Floats:
    cache = LayerCache(1, 48, None, cache_type=cache_type)
    return mixed(queries, cache.append(keys, values))


@pytest.mark.parametrize("cache_type", ["f16", "int8"])
def test_all_instruction_sets_round_alike(cache_type: CacheType, instruction_sets: InstructionSets) -> None:
    arrays = normal(1, 3, 9, 48), normal(2, 70, 1, 48), normal(3, 70, 1, 48)
    results = instruction_sets.each(_mixed_by, cache_type, *arrays)
    for name, result in results.items():
        np.testing.assert_array_equal(result, results["scalar"], err_msg=name)


def step(model: Model, ids: list[int], cache: object) -> Floats:
    return model.step([SequenceStep(np.array(ids), cache)])[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("cache_type", ["f16", "int8"])
@pytest.mark.parametrize("name", ["mistral-window", "lfm2"])
def test_models_with_rounded_caches(name: str, cache_type: CacheType, coded_folder: Callable[[str], Path]) -> None:
    exact, model = load(coded_folder(name), threads=2), load(coded_folder(name), threads=2, cache_type=cache_type)
    ids = random_ids(60, seed=3)
    cache = model.new_cache()
    found = [step(model, ids[:50], cache)]
    found += [step(model, [token], cache) for token in ids[50:]]
    differences = [relative_difference(row, exact.logits(ids[: 50 + n])[-1]) for n, row in enumerate(found)]
    assert max(differences) < 5 * ERRORS[cache_type]
    assert max(differences) > 1e-6  # it is rounded
    # One pass, a copy, and what follows after going back give the same bits.
    copy = cache.fork(cache.shared([*ids, 1]))
    assert copy.cache_type == cache_type
    np.testing.assert_array_equal(step(model, [5], copy), step(model, [*ids, 5], model.new_cache()))
    mark = cache.mark()
    step(model, [7, 8, 9], cache)
    cache.rewind(60, mark)
    np.testing.assert_array_equal(step(model, [5], cache), step(model, [*ids, 5], model.new_cache()))


def test_latent_attention_in_half_precision(checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint("deepseek_v3"), cache_type="f16")
    ids = random_ids(20)
    difference = relative_difference(model.logits(ids), load_dense(checkpoint("deepseek_v3")).logits(ids))
    assert 1e-6 < difference < 5e-3


@pytest.mark.parametrize(("name", "kind"), [("deepseek_v3", "latent attention"), ("gemma2", "capped scores")])
def test_attention_in_numpy_has_no_integers(name: str, kind: str, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError, match=rf"{kind}.* has no int8 cache; use f16, or f32"):
        load(checkpoint(name), cache_type="int8")


def test_a_type_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="the cache's type should be one of f32, f16, int8, found 'q4'"):
        load(TINY_LLAMA, cache_type="q4")


def test_bytes_per_token(checkpoint: Callable[[str], Path]) -> None:
    config = load_dense(TINY_LLAMA).config
    features = config.num_layers * config.num_kv_heads * config.head_dim
    assert cache_bytes_per_token(config, "f32") == 8 * features
    assert cache_bytes_per_token(config, "f16") == 4 * features
    assert cache_bytes_per_token(config, "int8") == 2 * features + 8 * config.num_layers * config.num_kv_heads
    hybrid = load_dense(checkpoint("lfm2")).config
    assert cache_bytes_per_token(hybrid, "f32") < 8 * hybrid.num_layers * hybrid.num_kv_heads * hybrid.head_dim
