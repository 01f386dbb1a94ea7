"""Entropy and Huffman code lengths of a histogram."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def entropy_bits(counts: Sequence[float]) -> float:
    """The entropy of counts, or of shares, in bits per symbol; 0 for at most one distinct symbol."""
    total = sum(counts)
    return sum(c / total * math.log2(total / c) for c in counts if c)


def huffman_lengths(counts: Sequence[int]) -> list[int]:
    """Code lengths of an optimal prefix code.

    Args:
        counts: positive counts, at least one.
    Returns:
        one length per count, in bits; [0] for a single symbol.
    """
    heap = [(count, leaf) for leaf, count in enumerate(counts)]
    heapq.heapify(heap)
    parents = [0] * (2 * len(counts) - 1)
    for node in range(len(counts), len(parents)):
        low, first = heapq.heappop(heap)
        high, second = heapq.heappop(heap)
        parents[first] = parents[second] = node
        heapq.heappush(heap, (low + high, node))
    depths = [0] * len(parents)
    for node in range(len(parents) - 2, -1, -1):
        depths[node] = depths[parents[node]] + 1
    return depths[: len(counts)]


def limited_lengths(counts: Sequence[int], limit: int) -> list[int]:
    """Code lengths of an optimal prefix code with no length above `limit`.

    Package-merge: Larmore and Hirschberg, "A fast algorithm for optimal length-limited Huffman codes", 1990.

    Args:
        counts: positive counts, at most 2**limit of them.
        limit: bits.
    Raises:
        ValueError: more symbols than 2**limit.
    """
    if len(counts) > 2**limit:
        raise ValueError(f"{len(counts)} symbols cannot have codes of at most {limit} bits")
    lengths = huffman_lengths(counts)
    if max(lengths) <= limit:
        return lengths
    coins = sorted((c, (i,)) for i, c in enumerate(counts))
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(limit):
        merged = sorted(coins + packages, key=lambda package: package[0])
        packages = [
            (merged[i][0] + merged[i + 1][0], merged[i][1] + merged[i + 1][1]) for i in range(0, len(merged) - 1, 2)
        ]
    lengths = [0] * len(counts)
    # The last round paired the candidates, so the first n - 1 pairs hold the 2n - 2 cheapest.
    for _, members in packages[: len(counts) - 1]:
        for member in members:
            lengths[member] += 1
    return lengths


def huffman_bits(counts: Sequence[int]) -> float:
    """The mean length of an optimal prefix code in bits per symbol, with which stored bits are compared."""
    present = [c for c in counts if c]
    if len(present) < 2:
        return 0.0
    return sum(c * n for c, n in zip(present, huffman_lengths(present), strict=True)) / sum(present)
