"""Code the matrices of an uncompressed checkpoint while transformers loads it, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.coder import MatrixCoder
from entrollm.compress.methods import make_methods
from entrollm.compress.options import CodingOptions
from entrollm.compress.planning import make_plan, with_size
from entrollm.errors import EntroLLMError, UnsupportedError
from entrollm.format.header import TensorTable
from entrollm.hf.names import StoredParameter, find_parameters
from entrollm.torch.backend import storage_device
from entrollm.torch.entries import to_tensor
from entrollm.torch.weight import CodedWeight


class LiveCoder:
    """Codes matrices from the files of a checkpoint to the same integers as `entrollm compress`.

    Args:
        folder: the checkpoint.
        model: the model that is being loaded, on the meta device.
        options: how to code.
    Raises:
        FormatError, UnsupportedError: the checkpoint cannot be coded.
        ValueError: an option does not suit the checkpoint, such as a size that cannot be reached.
    """

    def __init__(self, folder: Path, model: Any, options: CodingOptions) -> None:
        self._checkpoint = Checkpoint.open(folder)
        options = with_size(self._checkpoint, options)
        plan = make_plan(self._checkpoint, options)
        infos = {name: self._checkpoint.tensors[name] for name in plan.coded}
        shapes = {name: (info.shape[0], info.shape[1]) for name, info in infos.items()}
        self.parameters = find_parameters(model, shapes, plan.kept, self._checkpoint.are_equal)
        # Matrices that the model lacks are not coded.
        plan = plan.coding(name for parameter in self.parameters.values() for name in parameter.names())
        self._coder = MatrixCoder(self._checkpoint, make_methods(self._checkpoint, plan, options), options)
        # Of tied parameters, transformers asks for the one whose name is in the files.
        tied = {target: self.parameters[source] for target, source in _ties(model) if source in self.parameters}
        self.parameters = tied | self.parameters
        self._coded: set[str] = set()
        self._table = TensorTable()  # of the file that the matrices would make
        self.failed: EntroLLMError | None = None

    def code(self, parameter: StoredParameter, dtype: torch.dtype, device: torch.device) -> dict[str, CodedWeight]:
        """Code the matrices of a parameter.

        Args:
            parameter: one of `parameters`.
            dtype: the type of the parameter.
            device: where the matrices multiply.
        Returns:
            the coded matrices by name.
        Raises:
            FormatError: a weight is not finite.
        """
        self._coded.add(parameter.path)
        return {name: self._code(name, dtype, device) for name in parameter.names()}

    def is_done(self, parameter: StoredParameter) -> bool:
        """Whether the matrices of a parameter have been coded."""
        return parameter.path in self._coded

    def check_complete(self) -> None:
        """Check that transformers has asked for every matrix: it names tensors by rules of its own.

        Raises:
            UnsupportedError: a parameter was left with random values.
        """
        left = [found for found in self.parameters.values() if not self.is_done(found)]
        if left and self.failed is None:
            raise UnsupportedError(
                f"{self._checkpoint.path}: transformers does not find {left[0].path}, stored as {left[0].names()[0]}; "
                "compress the checkpoint with `entrollm compress`, which gives tensors their names in the model"
            )

    def close(self) -> None:
        """End the threads and close the checkpoint."""
        self._coder.close()
        self._checkpoint.close()

    def _code(self, name: str, dtype: torch.dtype, device: torch.device) -> CodedWeight:
        matrix = self._coder.code(name, self._table).matrix
        self._table.add_matrix(matrix)
        stored_on = storage_device(device)
        entries = {suffix: to_tensor(array).to(stored_on) for suffix, array in matrix.entries.items()}
        return CodedWeight(name, matrix.spec, entries, dtype, device)


Install = Callable[[Any, StoredParameter, Mapping[str, CodedWeight]], list[str]]


class QuantizeWhileLoading(ConversionOps):
    """The operation that transformers runs on a parameter to code it instead of storing it in the model.

    Args:
        coder: codes it.
        install: puts coded matrices into the model and returns the parameters that they replace.
    """

    def __init__(self, coder: LiveCoder, install: Install) -> None:
        self._coder = coder
        self._install = install

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[torch.Tensor]]:
        """Code the parameter `full_layer_name`, and leave nothing for transformers to store."""
        if self._coder.failed is not None:
            # Transformers continues after errors and reports all of them at the end; the first is enough.
            raise self._coder.failed
        found = next(iter(input_dict.values()))
        tensor = found[0] if isinstance(found, list) else found
        model, missing = kwargs["model"], kwargs.get("missing_keys")
        parameter = self._coder.parameters[kwargs["full_layer_name"]]
        if self._coder.is_done(parameter):  # an equal copy of a tied parameter
            return {}
        dtype = model.get_parameter(parameter.path).dtype
        try:
            weights = self._coder.code(parameter, dtype, tensor.device)
        except EntroLLMError as error:
            self._coder.failed = error
            raise
        done = self._install(model, parameter, weights)
        if missing is not None:
            missing.difference_update(done)
        return {}


def _ties(model: Any) -> Iterable[tuple[str, str]]:
    """Pairs of a parameter and the one that it is tied to."""
    pairs: Mapping[str, str] = model.all_tied_weights_keys
    return pairs.items()
