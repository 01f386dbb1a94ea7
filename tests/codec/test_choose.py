"""The chosen code keeps its promise in stored bytes, and predicts them."""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from entrollm import _core
from entrollm.codec.blocks import choose_blocks
from entrollm.codec.choose import Prefer, choose_code, choose_lossless_code, stored_bits
from entrollm.codec.cost import Processor
from entrollm.codec.flat import encode_flat
from entrollm.codec.huffman import entropy_bits, huffman_bits
from entrollm.format.blocks import block_count
from entrollm.format.code import Code, Field, Leaf, Split
from entrollm.format.flat import FlatCode
from tests.support.matrices import decode, store

# Entropy in bits to the alphabet of its grid.
ENTROPIES = {1.4: 15, 2.2: 15, 3.0: 15, 4.4: 255, 5.6: 255}
PROCESSORS: tuple[Processor, ...] = ("x86", "arm", "avx512")
_WEIGHTS = 1 << 19


@functools.cache
def sample(source: str, entropy: float, columns: int) -> NDArray[np.uint8]:
    """Symbols of a Gaussian or Student-t source, rounded with the step that gives the entropy."""
    rows = _WEIGHTS // columns
    generator = np.random.default_rng(7)
    shape = (rows, columns)
    weights = generator.standard_normal(shape) if source == "gaussian" else generator.standard_t(8, shape)
    half = ENTROPIES[entropy] // 2
    low, high = 1e-3, 10.0
    for _ in range(30):
        step = math.sqrt(low * high)
        symbols = (np.clip(np.rint(weights / step), -half, half) + half).astype(np.uint8)
        if entropy_bits(_core.histogram(symbols).tolist()) > entropy:
            low = step
        else:
            high = step
    return symbols


@pytest.mark.parametrize("columns", [576, 4096])
@pytest.mark.parametrize("entropy", ENTROPIES)
@pytest.mark.parametrize("source", ["gaussian", "student"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_stored_bits_keep_the_promise(processor: Processor, source: str, entropy: float, columns: int) -> None:
    symbols = sample(source, entropy, columns)
    counts = _core.histogram(symbols).tolist()
    assert abs(entropy_bits(counts) - entropy) < 0.01
    blocks = block_count(*symbols.shape, choose_blocks(*symbols.shape))
    optimum = huffman_bits(counts)
    limits: dict[Prefer, float] = {"size": optimum * 1.03, "speed": optimum + (0.25 if entropy < 4 else 0.35)}
    for prefer, limit in limits.items():
        code = choose_code(counts, blocks, prefer, processor)
        assert isinstance(code, FlatCode) == (prefer == "speed" and processor != "avx512")
        if isinstance(code, FlatCode):
            assert_flat_bits(code, symbols, optimum)
            continue
        stored = store(code, symbols)
        bits = (stored.dense.nbytes + stored.sparse.nbytes + stored.sizes.nbytes) * 8 / symbols.size
        assert optimum <= bits <= limit, prefer
        assert abs(stored_bits(code, counts, blocks) / bits - 1) < 0.01, prefer
        np.testing.assert_array_equal(decode(stored), symbols)


def assert_flat_bits(code: FlatCode, symbols: NDArray[np.uint8], optimum: float) -> None:
    with ThreadPoolExecutor(1) as executor:
        arrays = encode_flat(symbols, code, executor, lambda done: None)
    bits = sum(array.nbytes for array in arrays.values()) * 8 / symbols.size
    assert optimum <= bits <= optimum + 1
    predicted = stored_bits(code, _core.histogram(symbols).tolist(), 1)
    sizes = 16 / symbols.shape[1]  # of the patches of a row; deflated in files
    assert abs((predicted + sizes) / bits - 1) < 0.01


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_code_for_any_histogram_stores_it(data: st.DataObject) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    distinct = data.draw(st.integers(1, 256))
    alphabet = generator.permutation(256)[:distinct].astype(np.uint8)
    weights = np.arange(1, distinct + 1) ** -data.draw(st.sampled_from([0.0, 1.0, 2.0, 10.0]))
    symbols = generator.choice(alphabet, (data.draw(st.integers(1, 20)), 200), p=weights / weights.sum())
    counts = _core.histogram(symbols).tolist()
    prefer = data.draw(st.sampled_from(["size", "speed", "fixed"]))
    blocks = choose_blocks(*symbols.shape)
    code = choose_code(counts, block_count(*symbols.shape, blocks), prefer, "avx512")
    assert isinstance(code, Code)
    np.testing.assert_array_equal(decode(store(code, symbols, blocks)), symbols)


def test_size_is_never_larger_than_speed() -> None:
    for entropy in ENTROPIES:
        counts = _core.histogram(sample("gaussian", entropy, 576)).tolist()
        for processor in PROCESSORS:
            size, speed = (
                stored_bits(choose_code(counts, 114, prefer, processor), counts, 114) for prefer in ("size", "speed")
            )
            assert size <= speed


def test_flat_codes_are_left_out_where_they_cost_more_than_a_bit() -> None:
    symbols = np.zeros((8, 4096), np.uint8)
    symbols[:, ::20] = 100
    code = choose_code(_core.histogram(symbols).tolist(), 8, "speed", "x86")
    assert isinstance(code, Code)  # one bit, where flat fields would have eight


def test_one_symbol_becomes_a_leaf() -> None:
    counts = [0] * 256
    counts[17] = 5
    assert choose_code(counts, 1) == Code(Leaf(17))
    assert stored_bits(Code(Leaf(17)), counts, 1) == 0


def test_fixed_stores_whole_integers() -> None:
    for largest, bits in ((1, 1), (15, 4), (60, 6), (64, 8), (255, 8)):
        counts = [1] * (largest + 1) + [0] * (255 - largest)
        assert stored_bits(choose_code(counts, 1, "fixed"), counts, 1) == bits


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="the histogram is empty"):
        choose_code([0] * 256, 1)
    with pytest.raises(ValueError, match="prefer must be 'size', 'speed' or 'fixed', not 'small'"):
        choose_code([1] * 256, 1, "small")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="processor must be 'x86', 'arm' or 'avx512', not 'mips'"):
        choose_code([1] * 256, 1, "size", "mips")  # type: ignore[arg-type]


def test_the_histogram_counts() -> None:
    symbols = np.random.default_rng(3).integers(0, 256, (13, 999), np.uint8)
    expected = np.bincount(symbols.ravel(), minlength=256)
    np.testing.assert_array_equal(_core.histogram(symbols), expected)
    assert _core.histogram(np.zeros((0, 5), np.uint8)).sum() == 0


@pytest.mark.parametrize("processor", ["x86", "avx512"])
def test_lossless_words_take_a_fast_code_near_the_entropy(processor: Processor) -> None:
    weights = np.random.default_rng(4).standard_normal(1 << 18, np.float32) * np.float32(0.02)
    counts = np.bincount(weights.view(np.uint32) >> 23 & 0xFF, minlength=256).tolist()
    code = choose_lossless_code(counts, 32, 8, processor=processor)
    assert isinstance(code, Code) and isinstance(code.tree, Field)  # a chain of fields, unlike the smallest code
    assert isinstance(choose_code(counts, 32).tree, Split)
    assert stored_bits(code, counts, 32) + 8 <= 1.008 * (entropy_bits(counts) + 8)
    assert choose_lossless_code(counts, 32, 8, "speed", "x86") == FlatCode(64)


def test_lossless_words_take_the_smallest_code_where_no_other_is_near_the_entropy() -> None:
    counts = [1 << 16, 1 << 12, 1, *[0] * 253]
    assert choose_lossless_code(counts, 1, 0) == choose_code(counts, 1)
    assert choose_lossless_code([5, *[0] * 255], 1, 0) == Code(Leaf(0))
