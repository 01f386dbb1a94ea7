"""The stream that DFloat11's decoder takes, made with torch: its own encoder visits each weight in Python.

Bfloat16 weights are split into exponents, which get a Huffman code, and signs with mantissas, stored as they are. A
thread decodes 8 bytes, a block 512 threads; where the first code of each thread begins and the first weight of each
block lies is stored beside the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from entrollm.codec.huffman import limited_lengths

THREADS = 512
THREAD_BITS = 64
BLOCK_BITS = THREADS * THREAD_BITS
GAP_BITS = 5
# The decoder looks a little beyond the bytes and weights that it is given.
SLACK = 1024


@dataclass(frozen=True)
class Encoded:
    """What the decoder takes.

    Attributes:
        tables: uint8 (tables + 1, 256); a value of 256 - i goes on in table i, the last row has the codes' lengths.
        exponents: uint8, the stream and SLACK bytes.
        rest: uint8, signs and mantissas.
        gaps: uint8, GAP_BITS for each thread.
        positions: int32 (blocks + 1,).
    """

    tables: Tensor
    exponents: Tensor
    rest: Tensor
    gaps: Tensor
    positions: Tensor

    @property
    def stream_bytes(self) -> int:
        """Bytes of the stream."""
        return len(self.exponents) - SLACK

    @property
    def bits(self) -> float:
        """Per weight, in all."""
        others = self.tables.numel() + len(self.rest) + len(self.gaps) + 4 * len(self.positions)
        return 8 * (self.stream_bytes + others) / len(self.rest)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return 4 * THREADS + 4 + 2 * int(self.positions.diff().max()) + SLACK


def encode(weights: Tensor) -> Encoded:
    """Encode bfloat16 weights on their device."""
    patterns = weights.reshape(-1).view(torch.int16)
    exponents = (patterns >> 7) & 0xFF
    rest = ((patterns >> 8) & 0x80 | patterns & 0x7F).to(torch.uint8)
    counts = torch.bincount(exponents, minlength=256).tolist()
    lengths, codes = _code(counts)
    bits = torch.from_numpy(lengths).to(weights.device)[exponents.int()]
    ends = bits.cumsum(0)
    starts, total = ends - bits, int(ends[-1])
    values = torch.from_numpy(codes).to(weights.device)[exponents.int()] << (64 - (starts & 31) - bits)
    words = torch.zeros(total // 32 + 2, dtype=torch.int64, device=weights.device)
    words.index_add_(0, starts >> 5, (values >> 32) & 0xFFFFFFFF)
    words.index_add_(0, (starts >> 5) + 1, values & 0xFFFFFFFF)
    stream = torch.stack([words >> shift & 0xFF for shift in (24, 16, 8, 0)], 1).to(torch.uint8).reshape(-1)
    stream_bytes = -(-total // 8)
    blocks = -(-total // BLOCK_BITS)
    return Encoded(
        torch.from_numpy(_tables(lengths, codes)).to(weights.device),
        torch.nn.functional.pad(stream[:stream_bytes], (0, SLACK)),
        rest,
        _pack_gaps(starts, blocks * THREADS),
        torch.cat([_first(starts, blocks, BLOCK_BITS), ends.new_tensor([len(rest)])]).to(torch.int32),
    )


def _code(counts: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lengths and canonical codes by symbol, of at most 32 bits; one code is left free for what follows the stream."""
    used = [symbol for symbol, count in enumerate(counts) if count]
    found = limited_lengths([counts[symbol] for symbol in used] + [1], 32)[:-1]
    lengths, codes = np.zeros(256, np.int64), np.zeros(256, np.int64)
    code = last = 0
    for length, symbol in sorted(zip(found, used, strict=True)):
        code <<= length - last
        lengths[symbol], codes[symbol] = length, code
        code, last = code + 1, length
    return lengths, codes


def _tables(lengths: NDArray[np.int64], codes: NDArray[np.int64]) -> NDArray[np.uint8]:
    used = [(int(codes[symbol]), int(lengths[symbol]), int(symbol)) for symbol in np.flatnonzero(lengths)]
    depths = {(depth, code >> (length - 8 * depth)) for code, length, _ in used for depth in range((length + 7) // 8)}
    prefixes = sorted(depths)
    tables = np.zeros((len(prefixes) + 1, 256), np.uint8)
    for table, (depth, prefix) in zip(tables, prefixes, strict=False):
        entries: dict[int, int] = {}
        for code, length, symbol in used:
            left = length - 8 * depth
            if left <= 0 or code >> left != prefix:
                continue
            if left <= 8:
                entries[(code << (8 - left)) & 0xFF] = symbol
            else:
                entries[code >> (left - 8) & 0xFF] = 256 - prefixes.index((depth + 1, code >> (left - 8)))
        value = 0
        for byte in range(256):
            table[byte] = value = entries.get(byte, value)
    tables[-1] = lengths
    return tables


def _first(starts: Tensor, pieces: int, piece_bits: int) -> Tensor:
    """The first weight whose code begins in each piece of the stream."""
    return torch.searchsorted(starts, torch.arange(pieces, device=starts.device) * piece_bits)


def _pack_gaps(starts: Tensor, threads: int) -> Tensor:
    """Bits from the beginning of each thread's bytes to its first code."""
    first = _first(starts, threads, THREAD_BITS)
    begins = torch.arange(threads, device=starts.device) * THREAD_BITS
    gaps = torch.where(first < len(starts), starts[first.clamp(max=len(starts) - 1)] - begins, 0)
    bits = torch.stack([gaps >> shift & 1 for shift in reversed(range(GAP_BITS))], 1).reshape(-1, 8)
    weights = 1 << torch.arange(7, -1, -1, device=starts.device)
    return (bits * weights).sum(1).to(torch.uint8)
