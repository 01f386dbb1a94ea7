"""Code the matrices of an uncompressed checkpoint while transformers loads it, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.coder import MatrixCoder
from entrollm.compress.methods import make_methods
from entrollm.compress.options import CodingOptions
from entrollm.compress.planning import make_plan
from entrollm.errors import EntroLLMError
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
        plan = make_plan(self._checkpoint, options)
        infos = {name: self._checkpoint.tensors[name] for name in plan.coded}
        shapes = {name: (info.shape[0], info.shape[1]) for name, info in infos.items()}
        self.parameters = find_parameters(model, shapes, plan.kept)
        # Matrices that the model lacks are not coded.
        plan = plan.coding(name for parameter in self.parameters.values() for name in parameter.names())
        self._coder = MatrixCoder(self._checkpoint, make_methods(self._checkpoint, plan, options), options)
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
        return {name: self._code(name, dtype, device) for name in parameter.names()}

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
