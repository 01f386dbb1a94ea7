"""Hit an asked file size: one number, the coarseness, sets the steps of all matrices still to come."""

from __future__ import annotations

import math
from collections.abc import Mapping

from entrollm.compress.rate import RateCurve
from entrollm.compress.target import Target
from entrollm.errors import EntroLLMError

MIN_COARSENESS = 0.004
MAX_COARSENESS = 2.5
MIN_STEP = 0.002
MAX_STEP = 4.0
# A Gaussian of unit variance takes about this many bits less log2 of the step.
_BITS_AT_STEP_1 = 2.1
_CLOSE_BITS = 2e-4
_ITERATIONS = 60
# How far below the target a size may be; the promise is 0.005.
_SLACK = 0.002
_TRIES = 16
# Predictions are scaled by what they missed so far, within reason.
_LARGEST_CORRECTION = 1.03


class RateControl:
    """Gives each matrix its step, in the order in which they are coded, so that the whole meets the target.

    Steps are relative_step * coarseness. After each matrix the coarseness of the others is found again from the bytes
    that are really left, so that errors of the prediction do not add up; the last matrix is coded again until the
    size fits.

    Args:
        curves: the matrices, in the order of coding.
        relative_steps: from `importance.relative_steps`.
        fixed_bytes: everything in the files but the matrices.
        weights: of the whole model, kept tensors included.
        target: what is asked for.
    Raises:
        ValueError: no step reaches the target; the message has the feasible range.
    """

    def __init__(
        self,
        curves: Mapping[str, RateCurve],
        relative_steps: Mapping[str, float],
        fixed_bytes: int,
        weights: int,
        target: Target,
    ) -> None:
        self._curves = dict(curves)
        self._remaining = dict.fromkeys(curves)
        self._relative = relative_steps
        self._fixed = fixed_bytes
        self._weights = weights
        self._aim = target.aim_bytes(weights)
        self._limit = target.limit_bytes(weights)
        self._spent = self._expected = 0.0
        self._nudge = 1.0
        self._too_fine = self._too_coarse = 0.0  # nudges of the last matrix that gave too much and too little
        self._best = 0.0, 0.0  # the largest size within the limit, and its nudge
        self._tries = 0
        self.coarseness = self._solve(_first_guess((self._aim - fixed_bytes) * 8 / max(1, self._coded_weights())))
        self._check_feasible(target.file_bytes or self._aim)

    def step(self, name: str) -> float:
        """The step of a matrix over its RMS."""
        return min(MAX_STEP, max(MIN_STEP, self.coarseness * self._relative[name] * self._nudge))

    def predicted_bytes(self) -> float:
        """The predicted size of all files."""
        return self._fixed + self._spent + self._predict(self.coarseness)

    def settle(self, name: str, stored_bytes: int) -> bool:
        """Take note of what a matrix took.

        Returns:
            False: it is the last one and the size is off; code it again with the new `step`.
        Raises:
            EntroLLMError: the limit cannot be met.
        """
        if len(self._remaining) == 1 and self._retry(name, stored_bytes):
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
        self._tries += 1
        if self._best[0] < total <= self._limit:
            self._best = total, self._nudge
        if self._tries > _TRIES:
            # A tiny matrix may have no step that comes near: the largest size below the limit has to do.
            if not self._best[1]:
                raise EntroLLMError(f"the files would take {total:.0f} bytes, over the limit of {self._limit:.0f}")
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

    def _predict(self, coarseness: float) -> float:
        correction = self._spent / self._expected if self._expected else 1.0
        correction = min(_LARGEST_CORRECTION, max(1 / _LARGEST_CORRECTION, correction))
        steps = {name: min(MAX_STEP, max(MIN_STEP, coarseness * self._relative[name])) for name in self._remaining}
        return correction * sum(self._curves[name].at(step).stored_bytes for name, step in steps.items())

    def _solve(self, coarseness: float) -> float:
        """The coarseness at which the remaining matrices take the remaining bytes, or the nearest in range.

        Bits fall by about one per doubling of the steps, by three at the most where a code changes its shape on a small
        matrix; moving by half of the excess converges for all.
        """
        wanted = self._aim - self._fixed - self._spent
        weights = max(1, self._coded_weights())
        for _ in range(_ITERATIONS):
            excess_bits = (self._predict(coarseness) - wanted) * 8 / weights
            moved = min(MAX_COARSENESS, max(MIN_COARSENESS, coarseness * 2 ** min(2.0, max(-2.0, excess_bits / 2))))
            if abs(excess_bits) < _CLOSE_BITS or moved == coarseness:
                break
            coarseness = moved
        return coarseness

    def size_range(self) -> tuple[float, float]:
        """The smallest and the largest size of all files, in bytes, before any matrix is settled."""
        return self._fixed + self._predict(MAX_COARSENESS), self._fixed + self._predict(MIN_COARSENESS)

    def _check_feasible(self, asked_bytes: float) -> None:
        predicted = self.predicted_bytes()
        if abs(predicted - self._aim) <= 0.005 * self._aim:
            return
        smallest, largest = self.size_range()
        bits = 8 / self._weights
        raise ValueError(
            f"this model cannot take {asked_bytes:.0f} bytes ({asked_bytes * bits:.3f} bits per weight); "
            f"it can take {smallest:.0f} to {largest:.0f} bytes ({smallest * bits:.3f} to {largest * bits:.3f} bits)"
        )


def _first_guess(bits: float) -> float:
    return min(MAX_COARSENESS, max(MIN_COARSENESS, 2 ** (_BITS_AT_STEP_1 - min(max(bits, 0.0), 16.0))))
