"""Rounding to the paths of a trellis: two grids, half a step apart, of which the integers before choose one.

`codec/trellis.py` says which sequences of integers are paths. The Viterbi algorithm finds the cheapest of them for each
row, with errors and code lengths together: four paths are kept, one for each state, and where errors are fed back, each
has targets of its own. Columns are rounded from the last one to the first. The rule m[j + 1] = p[j] xor m[j - 1] reads
the same in both directions, so a path may begin in any state, and must come to m[0] = m[1] = 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.arrays import HOST, Array, Device, functions, like
from entrollm.quantize.rounding import BLOCK_COLUMNS

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

TRELLIS_ZERO = _core.TRELLIS_ZERO
"""The symbol of the integer 0."""
# The path of a block of columns is decided after some more columns, which are then rounded again.
_COLUMNS_AHEAD = 16
_CLOSED = 1e30
_STATES = np.arange(4.0, dtype=np.float32)[:, None]


class TrellisRounding:
    """Rounds weights, in steps, to numbers k or k + 1/2, the integers k of which are a path.

    Symbol k + TRELLIS_ZERO costs the squared error + price * its length, all of that times the weight of its column.

    Args:
        lengths: float64, shape (256,), the bits of each symbol; None if all take the same.
        price: what a bit is worth, in squared steps.
        shift: a number stands for the weight that is larger by this.
    """

    zero = TRELLIS_ZERO

    def __init__(self, lengths: Float64 | None = None, price: float = 0.0, shift: float = 0.0) -> None:
        lengths = np.zeros(256) if lengths is None else lengths
        self._shift = np.float32(shift)
        self.prices: Float32 = (price * lengths[: 2 * TRELLIS_ZERO]).astype(np.float32)

    def places(self, scaled: Float32, costs: Float32 | None = None) -> Float32:
        """Round the rows of a matrix, without feedback.

        Args:
            scaled: float32, shape (rows, columns), in steps.
            costs: float32, shape (columns,), what the square of an error costs; None if all columns are alike.
        Returns:
            float32, the same shape: the symbols, plus 1/2 on the second grid.
        """
        left = np.ascontiguousarray((scaled - self._shift).T)
        found = np.empty_like(left)
        path = Path(self.prices, np.ones(len(left), np.float32) if costs is None else costs, left)
        for end in range(len(left), 0, -BLOCK_COLUMNS):
            found[max(0, end - BLOCK_COLUMNS) : end] = path.round(left, None, end)
        found += np.float32(TRELLIS_ZERO)
        return np.ascontiguousarray(found.T)

    def symbols(self, scaled: Float32) -> NDArray[np.uint8]:
        """The symbols of the rows of a matrix: uint8, the shape of `scaled`."""
        return self.places(scaled).astype(np.uint8)


class Path:
    """The paths of all rows of a matrix, which grow from its last column to the first.

    Args:
        prices: of the symbols, float32, shape (2 TRELLIS_ZERO,), in squared steps.
        weights: float32, shape (columns,), what the square of an error costs.
        left: a matrix with a row for each column, for its size and its place.
        device: computes.
    """

    def __init__(self, prices: Float32, weights: Array, left: Array, device: Device = HOST) -> None:
        self._prices = like(left, prices)
        self._weights = weights
        self._device = device
        self._start = functions(left).zeros_like(left[:1]) + like(left, np.zeros((4, 1), np.float32))

    def first(self, end: int) -> int:
        """The first column that `round` looks at for the block of columns that ends before `end`."""
        return max(0, end - BLOCK_COLUMNS - _COLUMNS_AHEAD)

    def round(self, left: Array, reach: Array | None, end: int) -> Array:
        """Round a block of columns, after those behind it.

        Args:
            left: float32, shape (columns, rows), the numbers to round; errors of the columns behind are fed back.
            reach: what a 1 in a column takes from each before it, float32, for the columns from `first` to `end`; None
                if errors are not fed back.
            end: where the block ends.
        Returns:
            the numbers of the last columns before `end`, those of one block.
        """
        first = self.first(end)
        columns, weights = left[first:end], self._weights[first:end]
        if isinstance(left, np.ndarray):
            reach = None if reach is None else np.ascontiguousarray(reach)
            found = _core.round_trellis(columns, reach, weights, self._prices, self._start, first == 0)
        else:
            round_block = _round_first if first == 0 else _round
            (found,) = self._device.run(round_block, columns, reach, weights, self._prices, self._start)
        begin = max(0, end - BLOCK_COLUMNS)
        if begin:
            # The state before a column is rounded: whether it is on the second grid, and whether the one behind it is.
            edge = found[begin - first - 1 : begin - first + 1]
            on_second = 2 * (edge - functions(edge).floor(edge))
            self._start = (2 * on_second[0] + on_second[1] != like(left, _STATES)) * like(
                left, np.array([_CLOSED], np.float32)
            )
        return found[begin - first :]


def _round(left: Array, reach: Array, weights: Array, prices: Array, start: Array) -> tuple[Array]:
    """What `_core.round_trellis` does, on any device, for a block that lacks column 0."""
    return (_round_columns(left, reach, weights, prices, start, has_origin=False),)


def _round_first(left: Array, reach: Array, weights: Array, prices: Array, start: Array) -> tuple[Array]:
    """The same for a block with column 0."""
    return (_round_columns(left, reach, weights, prices, start, has_origin=True),)


def _round_columns(left: Array, reach: Array, weights: Array, prices: Array, cost: Array, *, has_origin: bool) -> Array:
    # A state is 2 m[j] + m[j + 1] before column j is rounded. The parity p of its integer leads to 2 m[j - 1] + m[j],
    # where m[j - 1] = p xor m[j + 1].
    xp = functions(left)
    targets = xp.stack((left,) * 4)
    steps: list[tuple[Array, Array]] = []
    for j in range(len(left) - 1, -1, -1):
        if j == 0 and has_origin:
            cost = xp.stack((cost[0], *(xp.full_like(cost[0], _CLOSED),) * 3))
        number, branch = _branches(targets[:, j], weights[j], prices, cost)
        # To each state lead the states of one grid, the second of them with the other parity.
        is_second, numbers, costs = [], [], []
        for parity, grid in ((0, 0), (0, 1), (1, 0), (1, 1)):
            first, second = (parity, 2 * grid), (1 - parity, 2 * grid + 1)
            is_second.append(branch[second] < branch[first])
            costs.append(xp.where(is_second[-1], branch[second], branch[first]))
            numbers.append(xp.where(is_second[-1], number[second], number[first]))
        cost = xp.stack(costs)
        steps.append((xp.stack(numbers), xp.stack(is_second)))
        targets = xp.stack(
            [
                xp.where(is_second[state], targets[2 * (state % 2) + 1, :j], targets[2 * (state % 2), :j])
                - numbers[state] * reach[j, :j, None]
                for state in range(4)
            ]
        )
    return _trace(xp.argmin(cost, 0), steps[::-1])


def _branches(targets: Array, weight: Array, prices: Array, cost: Array) -> tuple[Array, Array]:
    """The best numbers with an even and with an odd integer from each state, and their costs: (2, 4, n) each."""
    xp = functions(targets)
    on_second = (0.0, 0.0, 0.5, 0.5)
    x = xp.stack([targets[state] - on_second[state] for state in range(4)])
    nearest = xp.round(xp.clip(x, 1.0 - TRELLIS_ZERO, TRELLIS_ZERO - 2.0))
    other = xp.where(x > nearest, nearest + 1.0, nearest - 1.0)
    is_odd = nearest % 2 == 1
    integers = xp.stack((xp.where(is_odd, other, nearest), xp.where(is_odd, nearest, other)))
    errors = x - integers
    spent = prices[xp.asarray(integers + float(TRELLIS_ZERO), dtype=xp.int64)]
    costs = cost + (errors * errors + spent) * weight
    numbers = xp.stack([integers[:, state] + on_second[state] for state in range(4)], 1)
    return numbers, costs


def _trace(state: Array, steps: list[tuple[Array, Array]]) -> Array:
    """Follow the paths that end in `state` back: float32, shape (columns, n)."""
    xp = functions(state)
    found = []
    for numbers, is_second in steps:
        number, second = numbers[0], is_second[0]
        for other in range(1, 4):
            number = xp.where(state == other, numbers[other], number)
            second = xp.where(state == other, is_second[other], second)
        found.append(number)
        state = 2 * (state % 2) + second
    return xp.stack(found)
