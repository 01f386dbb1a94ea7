"""Meet a file size: one number, the coarseness, sets the steps of all matrices that are not coded yet."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from entrollm.compress.rate import RateCurve
from entrollm.compress.target import Target
from entrollm.errors import EntroLLMError

MIN_COARSENESS = 0.004
MAX_COARSENESS = 2.5
# The coarsest that a size for the coded matrices alone allows, about 3.3 bits for Gaussian weights.
COARSEST_BY_DEFAULT = 0.4
MIN_STEP = 0.002
MAX_STEP = 4.0
# A Gaussian of unit variance takes about this many bits minus log2 of the step.
_BITS_AT_STEP_1 = 2.1
_CLOSE_BITS = 2e-4
_CLOSE_CHOICES_BITS = 0.01
_ITERATIONS = 60
# The share of the target that a size may fall short of; the promise is 0.005.
_SLACK = 0.002
_TRIES = 16
# Predictions are corrected by the ratio of actual to predicted sizes so far, at most by this factor.
_LARGEST_CORRECTION = 1.03
# The last matrices take any step, to meet the size: those with this share of the weights, or more where the matrix
# before them is large, up to the second share. The others choose steps of their own, at coarsenesses that are spread by
# this factor either way.
_FREE_SHARE, _MOST_FREE = 0.03, 0.15
_FREE_OVER_CHOOSING = 2
_SPREAD = 1.1
_GOLDEN = 0.618034


class RateControl:
    """Gives each matrix its step, in the order of coding, so that the whole model meets the target.

    A step is relative_step * coarseness. After each matrix, the coarseness of the others is computed again from the
    bytes that are left, so that errors of the predictions do not add up. The last matrix is coded again until the size
    fits. A target for the coded matrices alone goes without that, and without an error where no step meets it.

    Args:
        curves: the matrices, in the order of coding.
        relative_steps: from `importance.relative_steps`.
        fixed_bytes: bytes of the files without the matrices.
        weights: weights of the whole model, kept tensors included.
        target: the size to meet.
        chooses_steps: whether matrices take the best steps of their own near the common one, for codes whose bits fall
            unevenly. The last of them do not, so that they can meet the target.
    Raises:
        ValueError: no step meets the target; the message states the possible range.
    """

    def __init__(
        self,
        curves: Mapping[str, RateCurve],
        relative_steps: Mapping[str, float],
        fixed_bytes: int,
        weights: int,
        target: Target,
        *,
        chooses_steps: bool = False,
    ) -> None:
        self._curves = dict(curves)
        self._remaining = dict.fromkeys(curves)
        self._relative = dict(relative_steps)
        self._choosing = self._spread_choices() if chooses_steps else frozenset()
        self._fixed = fixed_bytes
        self._weights = weights
        self._is_strict = target.coded_bits is None
        self._coarsest = MAX_COARSENESS if self._is_strict else COARSEST_BY_DEFAULT
        self._spent = self._expected = 0.0
        self._nudge = self._free_coarseness = 1.0
        self._too_fine = self._too_coarse = 0.0  # nudges at which the last matrix was too large and too small
        self._best = 0.0, 0.0  # the largest size within the limit, and its nudge
        self._tries = 0
        if target.coded_bits is not None:
            self._aim = self._limit = fixed_bytes + target.coded_bits * self._coded_weights() / 8
        else:
            self._aim, self._limit = target.aim_bytes(weights), target.limit_bytes(weights)
        self.coarseness = self._solve(_first_guess((self._aim - fixed_bytes) * 8 / max(1, self._coded_weights())))
        self._is_limit = target.file_bytes is not None
        if self._is_strict:
            self._check_feasible(target.file_bytes or self._aim)

    def step(self, name: str) -> float:
        """The step of a matrix, over the RMS of the matrix."""
        coarseness = self.coarseness if name in self._choosing else self._free_coarseness
        return self._step(name, coarseness * self._nudge)

    def predicted_bytes(self) -> float:
        """The predicted size of all files."""
        free = [name for name in self._remaining if name not in self._choosing]
        choosing = [name for name in self._remaining if name in self._choosing]
        predicted = self._predict(self.coarseness, choosing) + self._predict(self._free_coarseness, free)
        return self._fixed + self._spent + predicted

    def settle(self, name: str, stored_bytes: int) -> bool:
        """Record the size of a matrix that was coded.

        Returns:
            False if it is the last matrix and the total misses the target: code it again with its new `step`.
        Raises:
            EntroLLMError: the limit cannot be met.
        """
        if self._is_strict and len(self._remaining) == 1 and self._retry(name, stored_bytes):
            return False
        self._expected += self._curves[name].at(self.step(name)).stored_bytes
        self._spent += stored_bytes
        del self._remaining[name]
        if self._remaining:
            self.coarseness = self._solve(self.coarseness)
        return True

    def _retry(self, name: str, stored_bytes: int) -> bool:
        total = self._fixed + self._spent + stored_bytes
        if self._aim * (1 - _SLACK) <= total <= self._limit:
            return False
        if self._is_limit and total <= self._limit and self.coarseness <= MIN_COARSENESS:
            return False  # no step is finer
        self._tries += 1
        if self._best[0] < total <= self._limit:
            self._best = total, self._nudge
        if self._tries > _TRIES:
            # A tiny matrix may have no step that comes near. The largest size below the limit has to do.
            if not self._best[1]:
                raise EntroLLMError(
                    f"the files would take {total:.0f} bytes, over the limit of {self._limit:.0f}; give a larger size"
                )
            if self._nudge == self._best[1]:
                return False
            self._nudge = self._best[1]
            return True
        if total > self._limit:
            self._too_fine = self._nudge
        else:
            self._too_coarse = self._nudge
        if self._too_fine and self._too_coarse:
            self._nudge = math.sqrt(self._too_fine * self._too_coarse)
        else:
            excess_bits = (total - self._aim) * 8 / self._curves[name].weights
            self._nudge *= 2 ** min(1.0, max(-1.0, excess_bits * 1.1))
        return True

    def _coded_weights(self) -> int:
        return sum(self._curves[name].weights for name in self._remaining)

    def _predict(self, coarseness: float, names: Collection[str]) -> float:
        correction = self._spent / self._expected if self._expected else 1.0
        correction = min(_LARGEST_CORRECTION, max(1 / _LARGEST_CORRECTION, correction))
        return correction * sum(self._curves[name].at(self._step(name, coarseness)).stored_bytes for name in names)

    def _step(self, name: str, coarseness: float) -> float:
        step = min(MAX_STEP, max(MIN_STEP, coarseness * self._relative[name]))
        return self._curves[name].best_step(step) if name in self._choosing else step

    def _spread_choices(self) -> frozenset[str]:
        """The matrices that choose their steps: all but the last, in the order of coding.

        Their relative steps are spread a little. Otherwise, all of them would change to the next width at about the
        same coarseness, and no size in between could be met.
        """
        found = set()
        left = total = self._coded_weights()
        for i, name in enumerate(self._remaining):
            weights = self._curves[name].weights
            left -= weights
            if left < max(_FREE_SHARE * total, min(_FREE_OVER_CHOOSING * weights, _MOST_FREE * total)):
                break
            found.add(name)
            self._relative[name] *= _SPREAD ** (2 * (i * _GOLDEN % 1) - 1)
        return frozenset(found)

    def _solve(self, coarseness: float) -> float:
        """The coarseness at which the remaining matrices take the remaining bytes, or the nearest in range.

        When steps double, bits fall by about one, and by at most three for a small matrix whose code changes its shape.
        Moving by half of the excess converges in all cases.
        """
        wanted = self._aim - self._fixed - self._spent
        choosing = [name for name in self._remaining if name in self._choosing]
        close_bits = _CLOSE_CHOICES_BITS if choosing else _CLOSE_BITS
        coarseness = self._approach(coarseness, self._remaining, wanted, close_bits)
        self._free_coarseness = coarseness
        if choosing:
            free = [name for name in self._remaining if name not in self._choosing]
            left = wanted - self._predict(coarseness, choosing)
            self._free_coarseness = self._approach(coarseness, free, left, _CLOSE_BITS)
        return coarseness

    def _approach(self, coarseness: float, names: Collection[str], wanted: float, close_bits: float) -> float:
        weights = max(1, sum(self._curves[name].weights for name in names))
        for _ in range(_ITERATIONS):
            excess_bits = (self._predict(coarseness, names) - wanted) * 8 / weights
            moved = min(self._coarsest, max(MIN_COARSENESS, coarseness * 2 ** min(2.0, max(-2.0, excess_bits / 2))))
            if abs(excess_bits) < close_bits or moved == coarseness:
                break
            coarseness = moved
        return coarseness

    def size_range(self) -> tuple[float, float]:
        """The smallest and the largest size of all files in bytes; valid before any matrix is settled."""
        smallest, largest = (self._predict(limit, self._remaining) for limit in (MAX_COARSENESS, MIN_COARSENESS))
        return self._fixed + smallest, self._fixed + largest

    def _check_feasible(self, requested_bytes: float) -> None:
        predicted = self.predicted_bytes()
        if abs(predicted - self._aim) <= 0.005 * self._aim or (self._is_limit and predicted < self._aim):
            return
        smallest, largest = self.size_range()
        if self._choosing and smallest <= self._aim <= largest:
            return  # the last matrices meet what lies between two widths of another
        bits = 8 / self._weights
        raise ValueError(
            f"this model cannot take {requested_bytes:.0f} bytes ({requested_bytes * bits:.3f} bits per weight); "
            f"it can take {smallest:.0f} to {largest:.0f} bytes ({smallest * bits:.3f} to {largest * bits:.3f} bits)"
        )


def _first_guess(bits: float) -> float:
    return min(MAX_COARSENESS, max(MIN_COARSENESS, 2 ** (_BITS_AT_STEP_1 - min(max(bits, 0.0), 16.0))))
