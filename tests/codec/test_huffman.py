"""Huffman and length-limited code lengths against definitions and exhaustive search."""

from __future__ import annotations

import math
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrollm.codec.huffman import entropy_bits, huffman_bits, huffman_lengths, limited_lengths

counts_lists = st.lists(st.integers(1, 10_000), min_size=1, max_size=7)


@cache
def complete_lengths(symbols: int, limit: int) -> tuple[tuple[int, ...], ...]:
    """Every multiset of code lengths with a Kraft sum of exactly 1, rising; by splitting one leaf at a time."""
    if symbols == 1:
        return ((0,),)
    found = set()
    for lengths in complete_lengths(symbols - 1, limit):
        for i, length in enumerate(lengths):
            if length < limit:
                found.add(tuple(sorted((*lengths[:i], *lengths[i + 1 :], length + 1, length + 1))))
    return tuple(sorted(found))


def best_cost(counts: list[int], limit: int) -> int:
    """The least total bits over all complete codes: long codes for rare symbols."""
    falling = sorted(counts, reverse=True)
    return min(
        sum(c * n for c, n in zip(falling, lengths, strict=True)) for lengths in complete_lengths(len(counts), limit)
    )


def cost(counts: list[int], lengths: list[int]) -> int:
    return sum(c * n for c, n in zip(counts, lengths, strict=True))


@given(counts_lists)
def test_huffman_lengths_are_optimal(counts: list[int]) -> None:
    lengths = huffman_lengths(counts)
    assert cost(counts, lengths) == best_cost(counts, len(counts))
    assert sum(2.0**-n for n in lengths) == 1


@given(counts_lists, st.integers(1, 6))
def test_limited_lengths_are_optimal(counts: list[int], limit: int) -> None:
    if len(counts) > 2**limit:
        with pytest.raises(ValueError, match=f"{len(counts)} symbols cannot have codes of at most {limit} bits"):
            limited_lengths(counts, limit)
        return
    lengths = limited_lengths(counts, limit)
    assert max(lengths) <= limit
    assert cost(counts, lengths) == best_cost(counts, limit)
    assert sum(2.0**-n for n in lengths) == 1


@settings(max_examples=30)
@given(st.lists(st.integers(1, 10**9), min_size=2, max_size=256), st.integers(8, 16))
def test_large_alphabets_give_complete_codes(counts: list[int], limit: int) -> None:
    lengths = limited_lengths(counts, limit)
    assert sum(2 ** (limit - n) for n in lengths) == 2**limit
    assert max(lengths) <= limit
    assert cost(counts, huffman_lengths(counts)) <= cost(counts, lengths)


def test_a_limit_cuts_fibonacci_counts() -> None:
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])
    assert max(huffman_lengths(counts)) == 29
    lengths = limited_lengths(counts, 16)
    assert max(lengths) == 16
    assert sum(2.0**-n for n in lengths) == 1


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40))
def test_entropy_bounds_the_huffman_optimum(counts: list[int]) -> None:
    present = [c for c in counts if c]
    entropy, mean = entropy_bits(counts), huffman_bits(counts)
    if len(present) < 2:
        assert entropy == mean == 0
        return
    total = sum(present)
    assert math.isclose(entropy, -sum(c / total * math.log2(c / total) for c in present), abs_tol=1e-12)
    assert entropy <= mean + 1e-12 and mean < entropy + 1
    assert math.isclose(mean, cost(present, huffman_lengths(present)) / total)


def test_equal_counts_need_their_logarithm() -> None:
    assert entropy_bits([3] * 16) == 4
    assert huffman_bits([3] * 16) == 4
    assert huffman_lengths([5]) == [0]
