"""What calibration measured, kept in a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from entrollm.quantize.statistics import Sensitivity


class StoredStatistics:
    """Factors in .npy files and sensitivities in memory; see `Statistics`.

    Args:
        folder: an empty folder that outlives this.
        fingerprint: of the model's windows.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._folder = folder
        self._factors: dict[str, Path] = {}
        self._sensitivities: dict[str, Sensitivity] = {}

    def factor(self, name: str) -> NDArray[np.float32] | None:
        """The factor of a matrix's inputs, or None where unknown."""
        path = self._factors.get(name)
        if path is None:
            return None
        factor: NDArray[np.float32] = np.load(path)
        return factor

    def sensitivity(self, name: str) -> Sensitivity | None:
        """How much a matrix matters, or None where unknown."""
        return self._sensitivities.get(name)

    def add(self, name: str, factor: NDArray[np.float32], sensitivity: Sensitivity) -> None:
        """Keep what is known of a matrix."""
        path = self._folder / f"factor-{len(self._factors)}.npy"
        np.save(path, factor)
        self._factors[name] = path
        self._sensitivities[name] = sensitivity


class Spool:
    """Arrays that wait on disk between two passes over the layers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, key: str, array: NDArray[np.float32]) -> None:
        """Write an array."""
        np.save(self._path(key), array)

    def take(self, key: str) -> NDArray[np.float32]:
        """Read an array for the last time."""
        path = self._path(key)
        array: NDArray[np.float32] = np.load(path)
        path.unlink()
        return array

    def _path(self, key: str) -> Path:
        return self._folder / f"spool-{key}.npy"
