"""Code the matrices of an ordinary checkpoint while transformers loads it, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.coder import MatrixCoder
from entrollm.compress.methods import make_methods
from entrollm.compress.options import CompressOptions
from entrollm.compress.planning import make_plan
from entrollm.errors import EntroLLMError, UnsupportedError
from entrollm.format.header import TensorTable
from entrollm.hf.names import Place, find_places
from entrollm.torch.backend import resting_place, to_tensor
from entrollm.torch.weight import CodedWeight


class LiveCoder:
    """Codes matrices from the files of a checkpoint with the integers that `entrollm compress` would give them.

    Args:
        folder: the checkpoint.
        model: the model that is loaded, on the meta device.
        options: of compression.
    Raises:
        FormatError, UnsupportedError: the checkpoint cannot be coded.
        ValueError: an option does not suit it, such as a size out of reach.
    """

    def __init__(self, folder: Path, model: Any, options: CompressOptions) -> None:
        self._checkpoint = Checkpoint.open(folder)
        plan = make_plan(self._checkpoint, options)
        shapes = {name: self._checkpoint.tensors[name].shape for name in plan.coded}
        matrices = {name: (shape[0], shape[1]) for name, shape in shapes.items()}
        self.places = find_places(model, matrices, plan.kept, self._checkpoint.are_equal)
        # Matrices that the model lacks are not coded.
        plan = plan.coding(name for place in self.places.values() for name in place.names())
        self._coder = MatrixCoder(self._checkpoint, make_methods(self._checkpoint, plan, options), options)
        # Of tied parameters, transformers asks for the one whose name is in the files.
        tied = {target: self.places[source] for target, source in _ties(model) if source in self.places}
        self.places = tied | self.places
        self._coded: set[str] = set()
        self._table = TensorTable()  # of the file that the matrices would make
        self.failed: EntroLLMError | None = None

    def code(self, place: Place, dtype: torch.dtype, device: torch.device) -> dict[str, CodedWeight]:
        """Code the matrices of a parameter.

        Args:
            place: one of `places`.
            dtype: of the parameter.
            device: where the stored entries go.
        Returns:
            the matrices by name.
        Raises:
            FormatError: a weight is not finite.
        """
        self._coded.add(place.path)
        return {name: self._code(name, dtype, device) for name in place.names()}

    def is_done(self, place: Place) -> bool:
        """Whether the matrices of a parameter have been coded."""
        return place.path in self._coded

    def check_complete(self) -> None:
        """Check that transformers has asked for every matrix: it names tensors by rules of its own.

        Raises:
            UnsupportedError: a parameter was left with random values.
        """
        left = [place for place in self.places.values() if not self.is_done(place)]
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
        place = resting_place(device)
        entries = {suffix: to_tensor(array).to(place) for suffix, array in matrix.entries.items()}
        return CodedWeight(name, matrix.spec, entries, dtype, device)


class QuantizeWhileLoading(ConversionOps):
    """What transformers runs on a parameter that is to be coded, in place of storing it in the model.

    Args:
        coder: codes it.
        install: puts the coded matrices into the model.
    """

    def __init__(self, coder: LiveCoder, install: Callable[[Any, Place, Mapping[str, CodedWeight]], list[str]]) -> None:
        self._coder = coder
        self._install = install

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[torch.Tensor]]:
        """Code the parameter `full_layer_name`; nothing is left to be stored."""
        if self._coder.failed is not None:
            # Transformers goes on after errors and reports all of them at the end; the first is enough.
            raise self._coder.failed
        found = next(iter(input_dict.values()))
        tensor = found[0] if isinstance(found, list) else found
        model, missing = kwargs["model"], kwargs.get("missing_keys")
        place = self._coder.places[kwargs["full_layer_name"]]
        if self._coder.is_done(place):  # an equal copy of a tied parameter
            return {}
        dtype = model.get_parameter(place.path).dtype
        try:
            weights = self._coder.code(place, dtype, tensor.device)
        except EntroLLMError as error:
            self._coder.failed = error
            raise
        done = self._install(model, place, weights)
        if missing is not None:
            missing.difference_update(done)
        return {}


def _ties(model: Any) -> Iterable[tuple[str, str]]:
    """Pairs of a parameter and the one that it is tied to."""
    pairs: Mapping[str, str] = model.all_tied_weights_keys
    return pairs.items()
