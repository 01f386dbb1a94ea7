"""The trellis of two grids along a row: coded symbols choose on which of two grids, half a step apart, weights lie.

With k the symbols of a row, m[0] = m[1] = 0 and, from j = 1 on, m[j + 1] = (k[j] mod 2) xor m[j - 1]. The weight in
column j lies n[j] = 2 k[j] + m[j] half steps from the origin of the grid. So n are the symbols of an ordinary grid of
half the step, and k[j] = n[j] / 2, rounded down.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_TRELLIS_SYMBOL = 127
"""The largest symbol that a matrix with a trellis may have, so that 2 k + m is below 256."""


def half_steps(symbols: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What the symbols of whole rows stand for, in half steps.

    Args:
        symbols: shape (rows, columns), at most MAX_TRELLIS_SYMBOL.
    Returns:
        2 k + m modulo 256, the same shape.
    """
    found = np.left_shift(symbols, 1)
    parities = symbols & 1
    # The columns with an even number follow from those with an odd one before them, and the reverse.
    for first in (1, 2):
        grids = found[:, first + 1 :: 2]
        grids |= np.bitwise_xor.accumulate(parities[:, first::2], axis=1)[:, : grids.shape[1]]
    return found


def trellis_symbols(steps: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo `half_steps`."""
    return np.right_shift(steps, np.uint8(1))
