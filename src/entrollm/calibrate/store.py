"""What calibration measured, kept in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import HOST, Array, Device, single
from entrollm.calibrate.drift import DriftWalk
from entrollm.calibrate.watch import Stream
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.source import Stamps
from entrollm.quantize.statistics import Sensitivity
from entrollm.system import naming

# Rows of a triangle that are stored together, up to the last column of the last of them.
_ROWS = 256


class StoredStatistics:
    """Factors on disk and sensitivities in memory; see `Statistics`.

    Args:
        folder: an empty folder that outlives this.
        windows: token ids, shape (windows, tokens), that it was measured on.
        device: where factors go.
    Attributes:
        streams: the matrices whose inputs drift when those before them are quantized, and what their outputs are added
            to; None if unknown.
    """

    def __init__(self, folder: Path, windows: NDArray[np.int64], device: Device = HOST) -> None:
        self.windows = windows
        self.fingerprint = hashlib.sha256(windows.tobytes()).hexdigest()
        self.device = device
        self.source: Stamps = {}
        self.streams: dict[str, Stream | None] = {}
        self._folder = folder
        self._order: dict[str, None] = {}
        self._factors: dict[str, tuple[Path, int]] = {}
        self._sensitivities: dict[str, Sensitivity] = {}

    def factor(self, name: str) -> Array | None:
        """The factor of a matrix's inputs, or None where unknown."""
        if name not in self._factors:
            return None
        return _load_triangle(*self._factors[name], self.device)

    def sensitivity(self, name: str) -> Sensitivity | None:
        """How much a matrix matters, or None where unknown."""
        return self._sensitivities.get(name)

    @property
    def order(self) -> Sequence[str]:
        """The matrices in the order in which the model multiplies with them."""
        return [name for name in self._order if name in self._factors]

    def add_order(self, names: Iterable[str]) -> None:
        """Add matrices that come after all that were added before."""
        self._order |= dict.fromkeys(names)

    def drift(self, checkpoint: Checkpoint) -> DriftWalk:
        """A walk through the model that starts with nothing quantized."""
        return DriftWalk(checkpoint, self.windows, self.streams, self.device)

    def add(self, name: str, factor: Array, sensitivity: Sensitivity) -> None:
        """Keep what is known of a matrix."""
        path = self._folder / f"factor-{len(self._factors)}"
        _save_triangle(path, factor, self.device)
        self._factors[name] = path, len(factor)
        self._sensitivities[name] = sensitivity


class Spool:
    """Arrays that wait on disk between two passes over the layers."""

    def __init__(self, folder: Path, device: Device) -> None:
        self._folder = folder
        self._device = device

    def put(self, key: str, array: Array) -> None:
        """Write an array.

        Raises:
            OSError: it cannot be written; the error names the file, as that of numpy's own writing does not.
        """
        path, values = self._path(key).with_suffix(".npy"), np.asarray(self._device.take(array), order="C")
        with naming(path), path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
            file.write(values.data)

    def take(self, key: str) -> Array:
        """Read an array for the last time."""
        path = self._path(key).with_suffix(".npy")
        array = self._device.put(np.load(path, mmap_mode="r"))
        path.unlink()
        return array

    def put_triangle(self, key: str, array: Array) -> None:
        """Write the lower triangle of a square array."""
        _save_triangle(self._path(key), array, self._device)

    def take_triangle(self, key: str, size: int) -> Array:
        """Read the lower triangle of an array of `size` rows for the last time; float32, some of the rest is zero."""
        path = self._path(key)
        array = _load_triangle(path, size, self._device)
        path.unlink()
        return array

    def _path(self, key: str) -> Path:
        return self._folder / f"spool-{key}"


def _save_triangle(path: Path, array: Array, device: Device) -> None:
    """Write a lower triangle, in float32, by runs of rows."""
    with naming(path), path.open("wb") as file:
        for begin in range(0, len(array), _ROWS):
            rows = device.take(single(array[begin : begin + _ROWS, : begin + _ROWS]))
            file.write(np.ascontiguousarray(rows).data)


def _load_triangle(path: Path, size: int, device: Device) -> Array:
    stored = device.put(np.memmap(path, np.float32, "r"))
    array = device.zeros(size, size)
    done = 0
    for begin in range(0, size, _ROWS):
        end = min(size, begin + _ROWS)
        count = (end - begin) * end
        array[begin:end, :end] = stored[done : done + count].reshape(end - begin, end)
        done += count
    return array
