"""Rate-distortion-optimized rounding: to the integer with the least cost of error and code length together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import Array, functions

Float32 = NDArray[np.float32]

ZERO = 128
"""The symbol of weight 0 on a signed grid."""
BLOCK_COLUMNS = 64
"""Columns that are rounded together. Within them, errors are fed back one column at a time; to the columns before them,
by one matrix product."""

# 128 KB of float32, so that a block and its temporaries stay in the L2 cache.
_BLOCK_ELEMENTS = 1 << 15


class Rounding:
    """Rounds weights, in units of the step, to symbols around ZERO.

    With code lengths, symbol q costs (x - q)^2 + price * length(q) for weight x. One threshold decides between two
    neighbours, so rounding is a table look-up.

    Args:
        lengths: float64, shape (256,), the bits of each symbol; None rounds to the nearest symbol.
        price: what a bit is worth, in squared steps. At high rates, the slope of the rate-distortion curve is
            ln(2) / 6 = 0.1155 squared steps per bit.
        shift: a symbol stands for its integer plus this.
    """

    zero = ZERO

    def __init__(self, lengths: NDArray[np.float64] | None = None, price: float = 0.0, shift: float = 0.0) -> None:
        self._shift = np.float32(shift)
        self._thresholds: Float32 | None = None
        if lengths is not None and price > 0:
            self._thresholds = thresholds_between(lengths, price).astype(np.float32)
        self._halves = thresholds_between(np.zeros(256), 0.0).astype(np.float32)

    @property
    def thresholds(self) -> Float32:
        """float32, shape (255,), ascending. A number that, minus the shift, is above k of them becomes symbol k."""
        return self._halves if self._thresholds is None else self._thresholds

    def symbols(self, scaled: Float32) -> NDArray[np.uint8]:
        """Round float32 of any shape to uint8 of that shape; numbers beyond an end of the grid become that end."""
        flat = scaled.reshape(-1)
        out = np.empty(flat.size, np.uint8)
        for begin in range(0, flat.size, _BLOCK_ELEMENTS):
            out[begin : begin + _BLOCK_ELEMENTS] = self._block(flat[begin : begin + _BLOCK_ELEMENTS])
        return out.reshape(scaled.shape)

    def places(self, scaled: Float32, costs: Float32 | None = None) -> Float32:
        """The symbols as float32; what columns cost makes no difference here, as it does for `TrellisRounding`."""
        return self.symbols(scaled).astype(np.float32)

    def _block(self, scaled: Float32) -> NDArray[np.uint8]:
        if self._shift:
            scaled = scaled - self._shift
        if self._thresholds is None:
            nearest = np.rint(scaled)
            nearest += np.float32(ZERO)
            return np.clip(nearest, 0, 255, out=nearest).astype(np.uint8)
        below = np.floor(scaled)
        np.clip(below, np.float32(-ZERO), np.float32(254 - ZERO), out=below)
        symbols = (below + np.float32(ZERO)).astype(np.uint8)
        symbols += scaled > self._thresholds[symbols]
        return symbols


def thresholds_between(lengths: NDArray[np.float64], price: float) -> NDArray[np.float64]:
    """The numbers at which the cheaper of two neighbouring symbols changes, in steps: float64, shape (255,)."""
    below = np.arange(255, dtype=np.float64) - ZERO
    between = below + 0.5 + price * np.diff(lengths) / 2
    # A threshold stays between its two symbols.
    clipped: NDArray[np.float64] = np.clip(between, below, below + 1)
    return clipped


def round_columns(left: Array, reach: Array, thresholds: Array) -> tuple[Array]:
    """Round the columns of a block, the last one first, each compensating for the errors of those rounded before it.

    Args:
        left: float32, shape (block, n), at most `BLOCK_COLUMNS` columns, in units of the steps; overwritten.
        reach: float32, shape (block, block), what an integer of 1 in a column takes from each column before it.
        thresholds: see `to_integers`.
    Returns:
        the integers, float32, shape (block, n).
    """
    integers = functions(left).empty_like(left)
    for i in range(len(left) - 1, -1, -1):
        integers[i] = to_integers(left[i], thresholds)
        left[:i] -= reach[i, :i, None] * integers[i]
    return (integers,)


def to_integers(scaled: Array, thresholds: Array) -> Array:
    """Round on any device.

    Args:
        scaled: float32 (n,).
        thresholds: of a `Rounding`, on the same device.
    Returns:
        float32 (n,), symbols minus ZERO.
    """
    xp = functions(scaled)
    if xp is not np:
        return xp.searchsorted(thresholds, scaled) - float(ZERO)
    # Threshold k lies between k - ZERO and the next integer; looking it up is faster than a search.
    below = np.floor(scaled)
    np.maximum(below, np.float32(-ZERO), out=below)
    np.minimum(below, np.float32(254 - ZERO), out=below)
    below += scaled > thresholds[(below + np.float32(ZERO)).astype(np.intp)]
    return below
