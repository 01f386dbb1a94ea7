"""The native arithmetic between the products: close to NumPy's, and the same bits from every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from entrollm import _core
from entrollm.engine.arithmetic import gelu_tanh
from tests.support import reference_ops as reference
from tests.support.isa_workers import InstructionSets

Floats = NDArray[np.float32]

shared = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.one_of(st.integers(1, 70), st.sampled_from([80, 96, 128, 576]))
seeds = st.integers(0, 2**32)


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rms_norm(x: Floats, weight: Floats, threads: int = 2) -> Floats:
    return _core.rms_norm(x, weight, 1e-5, _core.ThreadPool(threads))


def rotate(x: Floats, cosines: Floats, sines: Floats) -> Floats:
    rotated = x.copy()
    _core.rotate(rotated, cosines, sines, _core.ThreadPool(2))
    return rotated


def swiglu(gate_up: Floats) -> Floats:
    return _core.swiglu(gate_up, _core.ThreadPool(2))


def geglu(gate_up: Floats) -> Floats:
    return _core.geglu(gate_up, _core.ThreadPool(2))


def attention(queries: Floats, keys: Floats, values: Floats, window: int | None, threads: int = 2) -> Floats:
    return _core.attention(queries, keys, values, window, _core.ThreadPool(threads))


def agree(results: dict[str, Floats], expected: Floats, tolerance: float, largest: float = 1e-30) -> None:
    """The same bits everywhere; errors within the tolerance of the largest result, or of `largest` if it is more."""
    first = results["scalar"]
    assert first.shape == expected.shape and first.dtype == np.float32
    largest = np.abs(expected).max(initial=largest)
    assert np.abs(first - expected).max(initial=0.0) <= tolerance * largest
    for name, found in results.items():
        np.testing.assert_array_equal(found.view(np.uint32), first.view(np.uint32), err_msg=name)


@shared
@given(st.integers(1, 5), st.integers(1, 3), sizes, seeds)
def test_rms_norm(instruction_sets: InstructionSets, tokens: int, heads: int, features: int, seed: int) -> None:
    x, weight = normal(seed, tokens, heads, features), normal(seed + 1, heads, features)
    agree(instruction_sets.each(rms_norm, x, weight), reference.rms_norm(x, weight, 1e-5), 1e-6)


@shared
@given(st.integers(1, 5), st.integers(1, 4), sizes, st.integers(0, 70), seeds)
def test_rotate(instruction_sets: InstructionSets, tokens: int, heads: int, width: int, half: int, seed: int) -> None:
    half = min(half, width // 2)
    x, angles = normal(seed, tokens, heads, width), normal(seed + 1, tokens, 1, half)
    cosines, sines = np.cos(angles), np.sin(angles)
    agree(instruction_sets.each(rotate, x, cosines, sines), reference.rotate(x, cosines, sines), 1e-6)


def test_rotate_leaves_other_heads_alone() -> None:
    x = normal(1, 4, 6, 8)
    angles = normal(2, 4, 1, 4)
    cosines, sines = np.cos(angles), np.sin(angles)
    expected = np.concatenate([reference.rotate(x[:, :4], cosines, sines), x[:, 4:]], axis=1)
    _core.rotate(x[:, :4], cosines, sines, _core.ThreadPool(1))
    np.testing.assert_allclose(x, expected, atol=1e-6)


@shared
@given(st.integers(1, 5), sizes, st.sampled_from([1.0, 30.0, 1e4]), seeds)
def test_gates(instruction_sets: InstructionSets, rows: int, features: int, scale: float, seed: int) -> None:
    gate_up = normal(seed, rows, 2 * features) * np.float32(scale)
    agree(instruction_sets.each(swiglu, gate_up), reference.swiglu(gate_up), 1e-6)
    gate, up = gate_up[:, :features], gate_up[:, features:]
    # 1 + tanh(x) cancels for negative gates, so that errors are those of the gate.
    largest = np.abs(gate * up).max()
    agree(instruction_sets.each(geglu, gate_up), gelu_tanh(gate.astype(np.float64)) * up, 1e-6, largest)


@shared
@given(st.data())
def test_attention(instruction_sets: InstructionSets, data: st.DataObject) -> None:
    tokens, before = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([0, 1, 5, 40, 64, 150]))
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 3, 4, 7]))
    width, seed = data.draw(sizes), data.draw(seeds)
    window = data.draw(st.one_of(st.none(), st.integers(1, 60)))
    scale = np.float32(data.draw(st.sampled_from([1.0, 20.0])))
    queries = normal(seed, tokens, kv_heads * group, width) * scale
    # Slices of larger buffers, as the cache hands them out.
    length = before + tokens
    keys = normal(seed + 1, kv_heads, width, length + 3)[:, :, 2 : 2 + length]
    values = normal(seed + 2, kv_heads, length + 5, width)[:, 4 : 4 + length]
    results = instruction_sets.each(_attention_of_slices, queries, keys, values, window)
    # What float32 leaves of a score is in proportion to it, and an error of a score is a relative one of its share.
    agree(results, reference.attention(queries, keys, values, window), 1e-4 if scale > 1 else 2e-5)


def _attention_of_slices(queries: Floats, keys: Floats, values: Floats, window: int | None) -> Floats:
    """Slices again, which a worker receives packed."""
    wide_keys = np.full((*keys.shape[:2], keys.shape[2] + 3), np.nan, np.float32)
    wide_keys[:, :, 2:-1] = keys
    wide_values = np.full((values.shape[0], values.shape[1] + 5, values.shape[2]), np.nan, np.float32)
    wide_values[:, 4:-1] = values
    return attention(queries, wide_keys[:, :, 2:-1], wide_values[:, 4:-1], window)


def test_threads_do_not_change_a_bit() -> None:
    queries, keys, values = normal(1, 50, 6, 64), normal(2, 3, 64, 90), normal(3, 3, 90, 64)
    x, weight = normal(4, 300, 256), normal(5, 256)
    for threads in (1, 3):
        mixed = attention(queries, keys, values, 40, threads)
        np.testing.assert_array_equal(mixed, attention(queries, keys, values, 40))
        np.testing.assert_array_equal(rms_norm(x, weight, threads), rms_norm(x, weight))


def test_nan_stays() -> None:
    x = normal(1, 3, 64)
    x[1, 5] = np.nan
    assert np.isnan(rms_norm(x, np.ones(64, np.float32))[1]).all()
    assert np.isnan(swiglu(x)[1, 5])
    keys = normal(2, 1, 64, 20)
    keys[0, 3, 4] = np.nan
    assert np.isnan(attention(normal(3, 1, 2, 64), keys, normal(4, 1, 20, 64), None)).all()


def test_empty_inputs_give_empty_results() -> None:
    assert rms_norm(normal(1, 0, 64), np.ones(64, np.float32)).shape == (0, 64)
    assert swiglu(normal(1, 0, 64)).shape == (0, 32)


_KEYS, _VALUES = normal(1, 2, 8, 5), normal(2, 2, 5, 8)
_ANGLES = normal(3, 4, 1, 4)
REFUSALS = {
    "weight": (lambda: rms_norm(normal(1, 3, 8), normal(2, 7)), "other numbers of features"),
    "no features": (lambda: rms_norm(normal(1, 3, 0), normal(2, 0)), "other numbers of features"),
    "four axes": (lambda: rms_norm(normal(1, 1, 1, 1, 8), normal(2, 8)), "1 to 3 axes"),
    "odd gate_up": (lambda: swiglu(normal(1, 2, 7)), "even number of columns"),
    "angles": (lambda: rotate(normal(1, 3, 2, 8), _ANGLES, _ANGLES), "angles do not fit"),
    "wide angles": (lambda: rotate(normal(1, 4, 2, 7), _ANGLES, _ANGLES), "angles do not fit"),
    "sines": (lambda: rotate(normal(1, 4, 2, 8), _ANGLES, _ANGLES[:3]), "as many sines"),
    "transposed": (
        lambda: _core.rotate(normal(1, 4, 8, 2).transpose(0, 2, 1), _ANGLES, _ANGLES, _core.ThreadPool(1)),
        "one behind the other",
    ),
    "head_dim": (lambda: attention(normal(1, 1, 2, 7), _KEYS, _VALUES, None), "other numbers of features"),
    "positions": (lambda: attention(normal(1, 1, 2, 8), _KEYS, _VALUES[:, :4], None), "same positions"),
    "queries": (lambda: attention(normal(1, 6, 2, 8), _KEYS, _VALUES, None), "fewer positions than queries"),
    "group": (lambda: attention(normal(1, 1, 3, 8), _KEYS, _VALUES, None), "multiple of kv_heads"),
    "window": (lambda: attention(normal(1, 1, 2, 8), _KEYS, _VALUES, 0), "at least one position"),
    "keys": (lambda: attention(normal(1, 1, 2, 8), _KEYS[:, :, ::2], _VALUES[:, :3], None), "side by side"),
    "backwards": (lambda: attention(normal(1, 1, 2, 8), _KEYS[::-1], _VALUES, None), "runs backwards"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_arrays_that_do_not_fit_are_refused(case: str) -> None:
    call, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        call()
