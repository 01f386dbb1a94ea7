"""A decoder of the GPU's flat layout, written from its description in docs/research/cuda.md."""

from __future__ import annotations

import numpy as np

from entrollm.torch.cuda.flat import FlatPart


def unpack_flat(part: FlatPart) -> np.ndarray:
    """The symbols of a flat matrix: uint8, shape (rows, columns)."""
    heads = part.heads.numpy()
    words = part.data.numpy().view(np.uint32)
    symbols = np.zeros((part.tiles * 16, part.stripes * 256), np.int64)
    at = 0
    for tile in range(part.tiles):
        bits = 1 + sum(tile >= end for end in part.tile_ends)
        for stripe in range(part.stripes):
            # Rows of 32 pieces of four words: word 4 i + k of lane l is word k of piece l of row i.
            pieces = words[at : at + bits * 128].reshape(bits, 32, 4)
            at += bits * 128
            for lane in range(32):
                lane_words = pieces[:, lane].reshape(-1)
                for index in range(128):
                    register, byte = divmod(index, 4)
                    step, half, below = register // 4, register % 4 // 2, register % 2
                    row = tile * 16 + lane // 4 + 8 * below
                    column = stripe * 256 + step * 32 + half * 16 + lane % 4 * 4 + byte
                    symbols[row, column] = _field(lane_words, bits, register, byte)
    assert at == len(words)
    base = np.repeat(heads[:, 48], 16)[:, None]
    symbols += base
    for tile in range(part.tiles):
        for patch in part.patches.numpy()[heads[tile, 49] : heads[tile, 50]]:
            symbols[tile * 16 + (patch & 15), patch >> 13] += (patch >> 4 & 511) - 256
    index = heads[:, :48].reshape(-1, 3)[: part.rows, 0]
    found = np.zeros((part.rows, part.columns), np.uint8)
    found[index] = symbols[: part.rows, : part.columns]
    return found


def _field(words: np.ndarray, bits: int, register: int, byte: int) -> int:
    """One field of a lane: its sets of 4, 2 and 1 bits, or its 8 bits, each in words of their own."""
    field = below = 0
    for width in (8,) if bits == 8 else (width for width in (4, 2, 1) if bits & width):
        word = int(words[4 * below + register * width // 8])
        shift = 8 * byte + register % (8 // width) * width
        field |= (word >> shift & (1 << width) - 1) << below
        below += width
    return field
