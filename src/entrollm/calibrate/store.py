"""What calibration measured, kept in a folder, or on a GPU that has room for it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from entrollm.arrays import HOST, Array, Device, functions, single
from entrollm.calibrate.drift import DriftWalk
from entrollm.calibrate.room import Room
from entrollm.calibrate.watch import Stream
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.source import Stamps
from entrollm.quantize.statistics import Sensitivity
from entrollm.system import naming

# Rows of a triangle that are stored together, up to the last column of the last of them.
_ROWS = 256


class _Shelf:
    """Arrays of a device that wait there while there is room, or else in files.

    Args:
        device: where they come from and go to.
        room: what they may take of it.
    """

    def __init__(self, device: Device, room: Room) -> None:
        self._device = device
        self._room = room
        self._held: dict[Path, list[Array]] = {}
        self._shapes: dict[Path, list[tuple[int, ...]]] = {}

    def put(self, path: Path, parts: Sequence[Array]) -> None:
        """Keep copies of arrays, in float32, in the file `path` unless there is room for them.

        Raises:
            OSError: the file cannot be written; the error names it, as that of numpy's own writing does not.
        """
        self._shapes[path] = [tuple(part.shape) for part in parts]
        if self._room.claim(self._size_bytes(path)):
            self._held[path] = [_copied(part) for part in parts]
            return
        with naming(path), path.open("wb") as file:
            for part in parts:
                file.write(np.ascontiguousarray(self._device.take(single(part))).data)

    def get(self, path: Path) -> list[Array]:
        """The arrays, in float32; not to be changed."""
        if path in self._held:
            return self._held[path]
        stored = self._device.put(np.memmap(path, np.float32, "r"))
        found, done = [], 0
        for shape in self._shapes[path]:
            size = math.prod(shape)
            found.append(stored[done : done + size].reshape(shape))
            done += size
        return found

    def take(self, path: Path) -> list[Array]:
        """The arrays, for the last time; they may be changed."""
        found = self.get(path)
        if self._held.pop(path, None) is None:
            path.unlink()
        else:
            self._room.give_back(self._size_bytes(path))
        del self._shapes[path]
        return found

    def clear(self) -> None:
        """Let all arrays go."""
        for path in list(self._shapes):
            self.take(path)

    def _size_bytes(self, path: Path) -> int:
        return 4 * sum(math.prod(shape) for shape in self._shapes[path])


class StoredStatistics:
    """Factors on disk and sensitivities in memory; see `Statistics`.

    Args:
        folder: an empty folder that outlives this.
        windows: token ids, shape (windows, tokens), that it was measured on.
        device: where factors go.
        room: what factors may take of the device; the others go to the folder.
    Attributes:
        streams: the matrices whose inputs drift when those before them are quantized, and what their outputs are added
            to; None if unknown.
        repeated: the matrices that the model multiplies with in several places.
    """

    def __init__(
        self, folder: Path, windows: NDArray[np.int64], device: Device = HOST, room: Room | None = None
    ) -> None:
        self.windows = windows
        self.fingerprint = hashlib.sha256(windows.tobytes()).hexdigest()
        self.device = device
        self.source: Stamps = {}
        self.streams: dict[str, Stream | None] = {}
        self.repeated: frozenset[str] = frozenset()
        self._folder = folder
        self._order: dict[str, None] = {}
        self._factors: dict[str, tuple[Path, int]] = {}
        self._shelf = _Shelf(device, room or Room())
        self._sensitivities: dict[str, Sensitivity] = {}

    def factor(self, name: str) -> Array | None:
        """The factor of a matrix's inputs, or None where unknown."""
        if name not in self._factors:
            return None
        path, size = self._factors[name]
        return _triangle(self._shelf.get(path), size, self.device)

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
        """A walk through the model that starts with nothing quantized; `follow` lets other processes start it too."""
        if self.device.group.rank == 0:
            self.device.group.from_first(("drift", (self.streams, self.repeated)))
        return DriftWalk(checkpoint, self.windows, self.streams, self.device, self.repeated)

    def add(self, name: str, factor: Array, sensitivity: Sensitivity) -> None:
        """Keep what is known of a matrix."""
        path = self._folder / f"factor-{len(self._factors)}"
        self._shelf.put(path, _stripes(factor))
        self._factors[name] = path, len(factor)
        self._sensitivities[name] = sensitivity


class Spool:
    """Arrays that wait between two passes over the layers.

    Args:
        folder: where they wait.
        device: where they come from and go to.
        room: what they may take of the device instead.
    """

    def __init__(self, folder: Path, device: Device, room: Room | None = None) -> None:
        self._folder = folder
        self._device = device
        self._shelf = _Shelf(device, room or Room())

    def put(self, key: str, array: Array) -> None:
        """Keep an array.

        Raises:
            OSError: its file cannot be written; the error names it.
        """
        self._shelf.put(self._path(key), [array])

    def take(self, key: str) -> Array:
        """Take an array, in float32."""
        (array,) = self._shelf.take(self._path(key))
        return array

    def put_triangle(self, key: str, array: Array) -> None:
        """Keep the lower triangle of a square array."""
        self._shelf.put(self._path(key), _stripes(array))

    def take_triangle(self, key: str, size: int) -> Array:
        """Take the lower triangle of an array of `size` rows; float32, some of the rest is zero."""
        return _triangle(self._shelf.take(self._path(key)), size, self._device)

    def clear(self) -> None:
        """Let all arrays go."""
        self._shelf.clear()

    def _path(self, key: str) -> Path:
        return self._folder / f"spool-{key}"


def _stripes(array: Array) -> list[Array]:
    """The lower triangle of a square array in runs of rows, each up to the last column of its last row."""
    return [array[begin : begin + _ROWS, : begin + _ROWS] for begin in range(0, len(array), _ROWS)]


def _triangle(stripes: Sequence[Array], size: int, device: Device) -> Array:
    array = device.zeros(size, size)
    for index, stripe in enumerate(stripes):
        array[index * _ROWS : index * _ROWS + len(stripe), : stripe.shape[1]] = stripe
    return array


def _copied(array: Array) -> Array:
    xp = functions(array)
    return xp.asarray(array, dtype=xp.float32, copy=True)
