"""The memory of a GPU in which arrays wait, beside everything that calibration and quantization take there."""

from __future__ import annotations

from collections.abc import Iterable

from entrollm.arrays import Device
from entrollm.calibrate.network import Network


class Room:
    """Bytes of a device that arrays may take while they wait.

    Args:
        size_bytes: how many there are.
    """

    def __init__(self, size_bytes: int = 0) -> None:
        self._left = size_bytes

    def claim(self, size_bytes: int) -> bool:
        """Take some, unless fewer are left."""
        if size_bytes > self._left:
            return False
        self._left -= size_bytes
        return True

    def give_back(self, size_bytes: int) -> None:
        """Return what was claimed."""
        self._left += size_bytes


def room_beside(network: Network, tokens: int, device: Device) -> Room:
    """What a device can spare beside the calibration of a model and the quantization of its matrices.

    Args:
        network: the model.
        tokens: of all windows.
        device: a device that may compute with arrays of its own; those of processors spare nothing.
    """
    outside, *layers = network.shapes()
    matrices = [shape for part in (outside, *layers) for shape in part]
    widest = max((columns for _, columns in matrices), default=0)
    largest = max((rows * columns for rows, columns in matrices), default=0)
    # What docs/research/quantization.md says of memory: the larger of statistics and drift, and one matrix.
    statistics = 8 * max((sum(columns**2 for _, columns in layer) for layer in layers), default=0)
    drift = 8 * (_weights(outside) + max(map(_weights, layers), default=0)) + 16 * tokens * widest
    needed = max(statistics, drift) + 24 * largest + 48 * widest**2
    return Room(int(device.spare * max(0, device.memory() - needed)))


def _weights(shapes: Iterable[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in shapes)
