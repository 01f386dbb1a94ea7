"""A model in memory as a whole, and what one window shows of the memory that its measurement takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from entrollm.calibrate.inputs import model_inputs, predictions
from entrollm.calibrate.network import Matrix, Network
from entrollm.calibrate.sums import TOKENS_PER_PRODUCT
from entrollm.calibrate.watch import Streams, Watch
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import EntroLLMError, Message, Option
from entrollm.torch.device import TorchDevice

# Of each logit, beside itself: probabilities, their sums, and gradients.
_LOGIT_BYTES = 24


def load_whole(
    checkpoint: Checkpoint, windows: NDArray[np.int64], device: TorchDevice, why: str, *, for_tuning: bool = False
) -> tuple[Network, Survey, Memory]:
    """A model in memory as a whole, what its first window shows, and what is left beside both.

    Args:
        checkpoint: the model.
        windows: token ids, shape (windows, tokens).
        device: where it is loaded.
        why: the reason, for errors.
        for_tuning: whether all weights have gradients.
    Raises:
        EntroLLMError: the model and one window do not fit the memory.
        FormatError: a tensor is missing or has another shape.
        UnsupportedError: the model does not read text.
    """
    memory = Memory(checkpoint, device, why, for_tuning=for_tuning)
    network = Network(checkpoint, device)
    memory.take((8 if for_tuning else 4) * network.weights())
    outer = set(network.views)
    network.load_all()
    survey = Survey(network, windows[:1])
    memory.take(survey.window_bytes)
    for name in outer:
        survey.streams.found.pop(name, None)  # what these are added to is nothing of a layer
    return network, survey, memory


class Memory:
    """What is left of the memory of a device."""

    def __init__(self, checkpoint: Checkpoint, device: TorchDevice, why: str, *, for_tuning: bool) -> None:
        self.left = self._size = device.memory()
        self._path = checkpoint.path
        self._name = device.name
        self._why = why
        self._hint = Message("compress it without {}", Option("tune" if for_tuning else "calibration"))

    def take(self, size_bytes: int) -> None:
        """Take a part.

        Raises:
            EntroLLMError: it is more than what is left.
        """
        self.left -= size_bytes
        if self.left < 0:
            raise EntroLLMError(
                f"{self._path}: calibration cannot take one layer after another ({self._why}), and all layers at once "
                f"need at least {(self._size - self.left) / 1e9:.1f} GB of memory, where {self._name} has "
                f"{self._size / 1e9:.1f} GB",
                hint=self._hint,
            )


class Survey:
    """What one window shows of a model: its products in order, how often each is made, and how much memory they take.

    Attributes:
        window_bytes: what a window takes while autograd holds it.
        sums: bytes of the sums over each matrix, or over each stack.
        streams: what the outputs of matrices are added to.
    """

    def __init__(self, network: Network, window: NDArray[np.int64]) -> None:
        self.window_bytes = 0
        self.streams = Streams()
        self._uses: dict[str, int] = {}
        self._seen: dict[str, Matrix] = {}
        self._looked_up: set[str] = set()
        self._last: Tensor | None = None
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in network.model.parameters()}
        hooks = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in network.layers]
        with torch.enable_grad(), Watch(network, self), saved_tensors_hooks(self._save, _restore):
            outputs = network.model(**model_inputs(network, window, predicts=True))
        self.window_bytes += _LOGIT_BYTES * predictions(outputs).numel()
        for hook in hooks:
            hook.remove()
        self.streams.leave()
        self._last = None
        self.sums: dict[str, int] = {}
        stacks = {matrix.stack for matrix in self._seen.values()} - {""}
        others = [matrix for matrix in network.matrices.values() if matrix.stack in stacks]
        for matrix in {id(matrix): matrix for matrix in (*self._seen.values(), *others)}.values():
            columns = matrix.shape[1]
            size_bytes = 8 * (1 + len(matrix.pieces)) * columns**2 + 4 * TOKENS_PER_PRODUCT * columns
            self.sums[matrix_key(matrix)] = self.sums.get(matrix_key(matrix), 0) + size_bytes

    @property
    def order(self) -> list[str]:
        """The checkpoint's matrices in the order of their first products."""
        return [piece.name for matrix in self._seen.values() for piece in matrix.pieces]

    @property
    def single(self) -> list[str]:
        """Those that are multiplied with once and for nothing else used, and are no members of stacks."""
        once = [name for name, uses in self._uses.items() if uses == 1 and name not in self._looked_up]
        return [name for name in once if not self._seen[name].stack]

    @property
    def repeated(self) -> list[str]:
        """Those that are multiplied with several times."""
        return [name for name, uses in self._uses.items() if uses > 1]

    def passes(self, memory: Memory) -> list[set[str]]:
        """The keys of matrices whose sums fit the memory together.

        Raises:
            EntroLLMError: the sums of one matrix do not.
        """
        found: list[set[str]] = [set()]
        left = memory.left
        for key, size_bytes in self.sums.items():
            if size_bytes > left and found[-1]:
                found.append(set())
                left = memory.left
            if size_bytes > left:
                memory.take(size_bytes)
            found[-1].add(key)
            left -= size_bytes
        return found

    def product(self, matrix: Matrix, x: Tensor, is_transposed: bool, multiply: Callable[[], Tensor]) -> Tensor:
        """See one product."""
        y = multiply()
        name = matrix.pieces[0].name
        self._seen.setdefault(name, matrix)
        self._uses[name] = self._uses.get(name, 0) + 1
        self.streams.product(name, y)
        # Hooks hold the inputs until gradients come, and matrices that are used again hold those gradients.
        self.window_bytes += 4 * (y.numel() + (0 if x is self._last else x.numel()))
        self._last = x
        return y

    def look_up(self, matrix: Matrix, ids: Tensor, rows: Tensor) -> None:
        """See rows that are looked up."""
        name = matrix.pieces[0].name
        self._seen.setdefault(name, matrix)
        self._looked_up.add(name)

    def add(self, first: Tensor, second: Tensor, total: Tensor) -> None:
        """Follow the streams."""
        self.streams.add(first, second, total)

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.streams.enter(args, kwargs)

    def _save(self, tensor: Tensor) -> None:
        """Count what autograd would keep. Tensors that it keeps several times count several times."""
        if tensor.untyped_storage().data_ptr() not in self._weights:
            self.window_bytes += tensor.numel() * tensor.element_size()


def _restore(saved: None) -> Tensor:
    raise AssertionError("nothing is passed back")


def matrix_key(matrix: Matrix) -> str:
    """Matrices of one key are measured together."""
    return matrix.stack or matrix.pieces[0].name
