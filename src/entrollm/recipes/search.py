"""The smallest files that stay close to the original: search for the size at which a divergence is reached."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.compress import CodingOptions, FolderResult, PostFit, Target, check_output, compress_folder, size_range
from entrollm.compress.statistics import Statistics
from entrollm.engine.load import load
from entrollm.evaluate.divergence import Divergence
from entrollm.evaluate.evaluation import evaluate
from entrollm.evaluate.windows import Windows
from entrollm.recipes.progress import Progress, Silent, report_weights
from entrollm.system import scratch_folder

# Where the search starts, and the slope of ln KL over bits: one bit more cuts an error to a quarter.
_START_BITS, _START_KL = 4.0, 0.05
_SLOPE = -2 * math.log(2)
# The search ends at this share of the allowed divergence, or when it knows the size this closely, in bits per weight.
_CLOSE_KL = 0.95
_CLOSE_BITS = 0.02
_TRIALS = 10

Measure = Callable[[Path], Divergence]


@dataclass(frozen=True, eq=False)
class DivergenceLimit:
    """How far a model may be from its original.

    Attributes:
        max_kl: mean KL divergence, in nats per prediction, above 0.
        windows: token ids to measure it on, shape (windows, tokens); calibration must not have seen them.
        measure: returns the divergence of a folder on them; `None` for the engine.
    """

    max_kl: float
    windows: NDArray[np.int64]
    measure: Measure | None = None

    def __post_init__(self) -> None:
        if not 0 < self.max_kl < math.inf:
            raise ValueError(f"the KL divergence must be above 0 and finite, found {self.max_kl}")


@dataclass(frozen=True)
class Trial:
    """One size: file bits per weight, and the divergence of a model of that size from the original."""

    file_bits: float
    divergence: Divergence


@dataclass(frozen=True)
class SearchResult:
    """The divergence of the smallest model found within the limit.

    Attributes:
        divergence: of the model that was written, from the original.
        trials: all sizes tried, in order.
        predictions: how many predictions each divergence was measured on.
        max_kl: the mean divergence that was allowed.
    """

    divergence: Divergence
    trials: tuple[Trial, ...]
    predictions: int
    max_kl: float

    def to_json(self) -> dict[str, Any]:
        """The divergence under "kl", and all sizes under "trials"."""
        trials = [{"file_bits": trial.file_bits, "kl_mean": trial.divergence.mean} for trial in self.trials]
        return {"kl": {**self.divergence.to_json(), "predictions": self.predictions}, "trials": trials}


def compress_within(
    model: str | Path,
    out: Path,
    options: CodingOptions,
    limit: DivergenceLimit,
    *,
    statistics: Statistics | None = None,
    post_fit: PostFit | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[FolderResult, SearchResult]:
    """Write the smallest model within a divergence from the original.

    Args:
        model: a checkpoint folder or a Hub id.
        out: the folder to make.
        options: as for `compress_folder`; their target is not used.
        limit: the divergence.
        statistics: from calibration.
        post_fit: as for `compress_folder`; called at every size that is tried.
        overwrite: replace an earlier output.
        progress: receives what is finished, and each size that was tried.
    Raises:
        ValueError: no size keeps the divergence, or an argument is wrong.
    """
    check_output(out, overwrite)
    progress = progress or Silent()
    search = _Search(model, options, limit, statistics, post_fit, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(f"{out.name}.trial-", out.parent) as folder:

        def attempt(bits: float) -> float:
            return search.attempt(folder / "model", bits)

        bits = smallest_size(attempt, size_range(model, options, statistics), limit.max_kl)
    written = search.compress(out, bits, overwrite)
    predictions = limit.windows.size - len(limit.windows)
    return written, SearchResult(search.found[bits], tuple(search.trials), predictions, limit.max_kl)


class _Search:
    """Compresses a model to sizes, and measures how far it is from its original at each.

    Attributes:
        trials: all sizes tried, in order.
        found: the divergence by the size that was asked for.
    """

    def __init__(
        self,
        model: str | Path,
        options: CodingOptions,
        limit: DivergenceLimit,
        statistics: Statistics | None,
        post_fit: PostFit | None,
        progress: Progress,
    ) -> None:
        self._model = model
        self._options = options
        self._statistics = statistics
        self._post_fit = post_fit
        self._progress = progress
        self._measure = limit.measure or _measured_by_engine(model, limit.windows, options.threads)
        self.trials: list[Trial] = []
        self.found: dict[float, Divergence] = {}

    def compress(self, out: Path, bits: float, overwrite: bool = False) -> FolderResult:
        """Write the model at a size."""
        return compress_folder(
            self._model,
            out,
            replace(self._options, target=Target(bits_per_weight=bits)),
            statistics=self._statistics,
            post_fit=self._post_fit,
            overwrite=overwrite,
            on_progress=report_weights(self._progress),
        )

    def attempt(self, out: Path, bits: float) -> float:
        """Write the model at a size in place of the last one, and measure its mean divergence."""
        shutil.rmtree(out, ignore_errors=True)
        written = self.compress(out, bits)
        divergence = self._measure(out)
        self.trials.append(Trial(written.file_bits, divergence))
        self.found[bits] = divergence
        self._progress.tried(self.trials[-1])
        return divergence.mean


def _measured_by_engine(model: str | Path, windows: NDArray[np.int64], threads: int | None) -> Measure:
    reference = load(model, threads=threads)
    text = Windows(windows, windows.size, 1)

    def measure(folder: Path) -> Divergence:
        evaluations, _ = evaluate([load(folder, threads=threads)], text, reference)
        divergence = evaluations[0].divergence
        assert divergence is not None  # there is a reference
        return divergence

    return measure


def smallest_size(attempt: Callable[[float], float], sizes: tuple[float, float], max_kl: float) -> float:
    """Find the fewest bits per weight at which a divergence is small enough; its logarithm falls with bits.

    Args:
        attempt: returns the divergence at a size.
        sizes: the smallest and the largest possible size.
        max_kl: the largest divergence allowed.
    Raises:
        ValueError: the divergence is above the limit at the largest size.
    """
    smallest, largest = sizes
    too_small: tuple[float, float] | None = None
    enough: tuple[float, float] | None = None
    bits = _START_BITS + math.log(max_kl / _START_KL) / _SLOPE
    for trial in range(_TRIALS):
        # A divergence that hardly falls could otherwise use up all trials before it reaches the largest size.
        is_last_hope = trial == _TRIALS - 1 and enough is None
        bits = largest if is_last_hope else min(largest, max(smallest, bits))
        found = attempt(bits)
        if found > max_kl:
            too_small = (bits, found)
            if bits == largest:
                raise ValueError(
                    f"no size keeps the KL divergence at or below {max_kl:.3g}: "
                    f"at {bits:.2f} bits per weight, the most that is possible, it is {found:.3g}"
                )
        else:
            enough = (bits, found)
            if bits == smallest or found >= _CLOSE_KL * max_kl:
                break
        if enough and too_small and enough[0] - too_small[0] < _CLOSE_BITS:
            break
        bits = _next(too_small, enough, max_kl)
    assert enough is not None  # the last trial would have raised
    return enough[0]


def _next(too_small: tuple[float, float] | None, enough: tuple[float, float] | None, max_kl: float) -> float:
    """The size where ln KL should be just below that of the limit, on a line through the closest points found."""
    wanted = math.log(max_kl * (1 + _CLOSE_KL) / 2)
    slope = _SLOPE
    if too_small and enough:
        # A divergence of 0 has no logarithm.
        drop = math.log(max(enough[1], 1e-12) / too_small[1])
        slope = drop / (enough[0] - too_small[0])
        bits = too_small[0] + (wanted - math.log(too_small[1])) / slope
        margin = 0.1 * (enough[0] - too_small[0])
        return min(enough[0] - margin, max(too_small[0] + margin, bits))
    bits, found = too_small or enough or (_START_BITS, _START_KL)
    return bits + (wanted - math.log(max(found, 1e-12))) / slope
