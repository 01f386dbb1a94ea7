"""What layers without a cache of keys and values keep of a sequence: a state of fixed size, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from entrollm.engine.weights import Floats, Weights, load_tensor

_FLOAT32 = np.dtype(np.float32)


class Advance(Protocol):
    """One step of a layer with a state."""

    def __call__(self, state: RecurrentState, /, *rows: Floats) -> Floats:
        """Bring the state n tokens forward: arrays with n rows each -> float32 (n, features)."""


class Recurrence(Protocol):
    """What a layer with a state asks of the sequences in a pass."""

    def advance(self, rows: Sequence[Floats], step: Advance) -> Floats:
        """Run n tokens.

        Args:
            rows: arrays with one row for each token.
            step: called once for each sequence, with its state and its rows.
        Returns:
            float32 (n, features).
        """


class RecurrentState:
    """The state of one layer and one sequence.

    Unlike a cache it cannot go back: it stands for all tokens so far.

    Args:
        window: shape of the inputs that a convolution still needs, (kernel - 1, channels).
        memory: shape of the recurrent memory; None if there is none.

    Attributes:
        window, memory: float32 arrays of these shapes, zero at the start; a step may replace them.
    """

    def __init__(self, window: tuple[int, int], memory: tuple[int, int, int] | None) -> None:
        self.window: Floats = np.zeros(window, dtype=np.float32)
        self.memory: Floats = np.zeros(memory or (0, 0, 0), dtype=np.float32)
        self._length = 0

    def advance(self, rows: Sequence[Floats], step: Advance) -> Floats:
        """Run n tokens of one sequence; see Recurrence."""
        self._length += len(rows[0])
        return step(self, *rows)

    def can_truncate(self, length: int) -> bool:
        """Whether the state is that after `length` tokens."""
        return length == self._length

    def truncate(self, length: int) -> None:
        """Do nothing; can_truncate(length) must hold."""

    def fork(self, length: int) -> RecurrentState:
        """A copy, or a state at the start if `length` is 0; else can_truncate(length) must hold."""
        copy = RecurrentState((0, 0), None)
        copy.window, copy.memory = self.window.copy(), self.memory.copy()
        if length == 0:
            copy.window.fill(0)
            copy.memory.fill(0)
        copy._length = length
        return copy

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the state is, by name, for a file."""
        return {"window": self.window, "memory": self.memory}

    def restore(self, length: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Become what `arrays` gave after `length` tokens.

        Raises:
            ValueError: they do not fit.
        """
        ours = self.arrays()
        check_arrays(arrays, {name: each.shape for name, each in ours.items()}, dict.fromkeys(ours, _FLOAT32))
        self.window, self.memory = arrays["window"].copy(), arrays["memory"].copy()
        self._length = length


def check_arrays(
    arrays: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype[Any]]
) -> None:
    """Check that there are the arrays that are expected, and no others.

    Raises:
        ValueError: one is missing, needless, or of another shape or type.
    """
    if arrays.keys() != shapes.keys():
        raise ValueError(f"expected {', '.join(shapes)}, found {', '.join(sorted(arrays)) or 'nothing'}")
    for name, array in arrays.items():
        if array.shape != shapes[name] or array.dtype != dtypes[name]:
            raise ValueError(
                f"{name} is {array.dtype} {list(array.shape)}, expected {dtypes[name]} {list(shapes[name])}"
            )


class NoState:
    """What a layer keeps that does not mix tokens."""

    def can_truncate(self, length: int) -> bool:
        """True."""
        return True

    def truncate(self, length: int) -> None:
        """Do nothing."""

    def fork(self, length: int) -> NoState:
        """Return itself."""
        return self


def load_kernel(weights: Weights, name: str, channels: int, size: int) -> Floats:
    """The kernel `name` of a convolution, as `convolve` takes it.

    Raises:
        FormatError: it is missing or has another shape.
    """
    return np.ascontiguousarray(load_tensor(weights, name, (channels, 1, size))[:, 0].T)


def convolve(state: RecurrentState, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
    """Convolve each channel with the last inputs, which the state keeps.

    Args:
        state: of the layer.
        x: float32 (n, channels).
        weight: float32 (kernel, channels), the factor of the newest input last.
        bias: float32 (channels,); None if there is none.
    Returns:
        float32 (n, channels).
    """
    joined = np.concatenate([state.window, x])
    y: Floats = joined[: len(x)] * weight[0]
    for offset in range(1, len(weight)):
        y += joined[offset : offset + len(x)] * weight[offset]
    if bias is not None:
        y += bias
    state.window = joined[len(x) :].copy()
    return y
