"""The smallest file that keeps a model's predictions: search for the size at which a divergence is reached."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.compress import CompressOptions, CompressResult, PostFit, Target, check_output, compress, size_range
from entrollm.compress.statistics import Statistics
from entrollm.engine.load import load
from entrollm.evaluate.divergence import Divergence
from entrollm.evaluate.evaluation import evaluate
from entrollm.evaluate.windows import Windows

# Where the search starts, and how fast ln KL falls with bits: an error falls to a quarter per bit.
_START_BITS, _START_KL = 4.0, 0.05
_SLOPE = -2 * math.log(2)
# Good enough: a divergence so little below the limit, or a size known so closely, in bits per weight.
_CLOSE_KL = 0.95
_CLOSE_BITS = 0.02
_TRIALS = 10


@dataclass(frozen=True, eq=False)
class DivergenceLimit:
    """How far a model may be from its original.

    Attributes:
        max_kl: mean KL divergence, in nats per prediction, above 0.
        windows: token ids, shape (windows, tokens), that it is measured on; not those of a calibration.
    """

    max_kl: float
    windows: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not 0 < self.max_kl < math.inf:
            raise ValueError(f"the KL divergence must be above 0, found {self.max_kl}")


@dataclass(frozen=True)
class Trial:
    """One size: file bits per weight, and the divergence of a model of that size from the original."""

    file_bits: float
    divergence: Divergence


@dataclass(frozen=True)
class SearchResult:
    """The smallest model found whose mean divergence is within the limit.

    Attributes:
        compressed: what was written.
        divergence: its divergence from the original.
        trials: all sizes tried, in order.
        predictions: how many each divergence was measured on.
    """

    compressed: CompressResult
    divergence: Divergence
    trials: tuple[Trial, ...]
    predictions: int

    def to_json(self) -> dict[str, Any]:
        """What `CompressResult.to_json` has, and the divergence under 'kl'."""
        trials = [{"file_bits": trial.file_bits, "kl_mean": trial.divergence.mean} for trial in self.trials]
        kl = {**self.divergence.to_json(), "predictions": self.predictions}
        return {**self.compressed.to_json(), "kl": kl, "trials": trials}


def compress_within(
    model: str | Path,
    out: Path,
    options: CompressOptions,
    limit: DivergenceLimit,
    *,
    statistics: Statistics | None = None,
    post_fit: PostFit | None = None,
    overwrite: bool = False,
    on_trial: Callable[[Trial], None] | None = None,
) -> SearchResult:
    """Write the smallest model within a divergence from the original.

    Args:
        model: a checkpoint folder or a Hub id.
        out: the folder to make.
        options: as for `compress`; their target is not used.
        limit: the divergence.
        statistics: from calibration.
        post_fit: as for `compress`, at every size that is tried.
        overwrite: replace an earlier output.
        on_trial: called after each size that was tried.
    Raises:
        ValueError: no size keeps the divergence, or an argument is wrong.
    """
    check_output(out, overwrite)
    measured = Windows(limit.windows, limit.windows.size, 1)
    reference = load(model, threads=options.threads)
    trials: list[Trial] = []
    tried: dict[float, Divergence] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.trial-", dir=out.parent) as folder:

        def attempt(bits: float) -> float:
            place = Path(folder) / "model"
            shutil.rmtree(place, ignore_errors=True)
            result = compress(model, place, _at(options, bits), statistics=statistics, post_fit=post_fit)
            evaluations, _ = evaluate([load(place, threads=options.threads)], measured, reference)
            divergence = evaluations[0].divergence
            assert divergence is not None
            trials.append(Trial(result.file_bits, divergence))
            tried[bits] = divergence
            if on_trial is not None:
                on_trial(trials[-1])
            return divergence.mean

        bits = smallest_size(attempt, size_range(model, options, statistics), limit.max_kl)
    compressed = compress(model, out, _at(options, bits), statistics=statistics, post_fit=post_fit, overwrite=overwrite)
    return SearchResult(compressed, tried[bits], tuple(trials), limit.windows.size - len(limit.windows))


def smallest_size(attempt: Callable[[float], float], sizes: tuple[float, float], max_kl: float) -> float:
    """The least bits per weight found at which `attempt` gives at most `max_kl`; its logarithm falls with bits.

    Args:
        attempt: gives the divergence at a size.
        sizes: the range of sizes.
        max_kl: the limit.
    Raises:
        ValueError: the divergence is above the limit at the largest size.
    """
    smallest, largest = sizes
    too_small: tuple[float, float] | None = None
    enough: tuple[float, float] | None = None
    bits = _START_BITS + math.log(max_kl / _START_KL) / _SLOPE
    for trial in range(_TRIALS):
        # Divergences that hardly fall would have used up all trials on the way.
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
    """Where ln KL should be a little below the limit's, on the line through the closest points on either side."""
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


def _at(options: CompressOptions, bits: float) -> CompressOptions:
    return replace(options, target=Target(bits_per_weight=bits))
