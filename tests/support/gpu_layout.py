"""A slow, obvious decoder of the GPU layout: one codeword after another, straight from its description."""

from __future__ import annotations

import numpy as np

from entrollm.torch.cuda.chunks import Chunks
from entrollm.torch.cuda.shape import Shape
from entrollm.torch.cuda.triples import TripleCode


def _bits(words: np.ndarray, lane: int, position: int, count: int) -> int:
    """`count` bits of one lane's stream; `words` has shape (rows, 32)."""
    value = 0
    for i in range(count):
        at = position + i
        value |= (int(words[at // 32, lane]) >> at % 32 & 1) << i
    return value


def unpack(chunks: Chunks, shape: Shape, code: TripleCode) -> np.ndarray:
    """Symbols in the order in which the rows were written: int64, shape (rows, columns)."""
    data = chunks.data.numpy()
    out = np.zeros((shape.tiles * 16, shape.spans * 72), np.int64)
    table = code.table()
    for tile in range(shape.tiles):
        for chunk, (begin, end) in enumerate(shape.chunk_spans()):
            offset, size, tail, counts = (int(v) & 0xFFFFFFFF for v in chunks.table[tile, chunk])
            bytes_ = data[offset * 16 : (offset + size) * 16]
            streams = bytes_[:tail].view(np.uint32).reshape(-1, 32)
            rows, patches = counts >> 16, counts & 0xFFFF
            bases = bytes_[tail : tail + 16].view(np.uint16)
            deltas = bytes_[tail + 16 :][: shape.segments * 64].reshape(shape.segments, 2, 32)
            for segment in range(shape.segments):
                first = begin + (end - begin) * segment // shape.segments
                last = begin + (end - begin) * (segment + 1) // shape.segments
                for stream in range(2):
                    words = np.pad(streams[:rows] if stream == 0 else streams[rows:], ((0, 1), (0, 0)))
                    for lane in range(32):
                        at = int(bases[segment]) + 2 * int(deltas[segment, stream, lane]) + 7
                        row = tile * 16 + stream * 8 + lane // 4
                        for part in range(first * 6, last * 6):
                            entry = int(table[_bits(words, lane, at, 8)])
                            at += entry & 255
                            column = part * 12 + lane % 4 * 3
                            out[row, column : column + 3] = [entry >> 8 & 255, entry >> 16 & 255, entry >> 24]
            left, right = begin * 72, min(shape.columns, end * 72)
            words = bytes_[tail + 16 + shape.segments * 64 + (0 if chunk else 192) :].view(np.uint32)
            units = -(-right // 64) - left // 64
            for bits in (4, 2, 1):
                if not code.raw_bits & bits:
                    continue
                for unit in range(units):
                    for lane in range(32):
                        for register in range(8):
                            word = int(words[(unit * bits + register // (8 // bits)) * 32 + lane])
                            shift = 8 - bits * (register % (8 // bits) + 1)
                            row = tile * 16 + lane // 4 + register % 2 * 8
                            for byte in range(4):
                                column = (
                                    left // 64 * 64
                                    + unit * 64
                                    + register // 4 * 32
                                    + register // 2 % 2 * 16
                                    + lane % 4 * 4
                                    + byte
                                )
                                value = word >> 8 * byte + shift & (1 << bits) - 1
                                if left <= column < right:
                                    out[row, column] += value << (code.raw_bits & bits - 1)
                words = words[units * bits * 32 :]
            for patch in words[:patches].tolist():
                digit = patch >> 13
                column = digit // 32 * 24 + digit % 32 // 4 % 2 * 12 + digit % 32 // 8 * 3 + digit % 4 - 1
                out[tile * 16 + patch % 16, column] += (patch >> 4 & 511) - 256
    return out[: shape.rows, : shape.columns] + code.base
