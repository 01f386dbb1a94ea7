"""A model of transformers whose weights come from a checkpoint, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from entrollm.calibrate.lockstep import UnwalkableError
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import FormatError, UnsupportedError
from entrollm.format import layout
from entrollm.torch.device import TorchDevice

_FOLLOWED = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


@dataclass(frozen=True)
class Piece:
    """Rows of a matrix that are a matrix of the checkpoint.

    Attributes:
        name: the checkpoint's matrix.
        begin, end: its rows.
    """

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Matrix:
    """A matrix that a model multiplies with or looks rows up in.

    Attributes:
        pieces: what it is made of, in the order of its rows.
        shape: as it is stored.
        stack: the parameter that it is a member of; empty if it is a parameter itself.
    """

    pieces: tuple[Piece, ...]
    shape: tuple[int, int]
    stack: str = ""


@dataclass(frozen=True)
class _Source:
    """The checkpoint's tensors that a parameter is made of.

    Attributes:
        members: for each member of a stack, the tensors that lie one below the other in it; a single tensor otherwise.
        is_merged: whether the parameter is a stack of the members.
    """

    members: tuple[tuple[str, ...], ...]
    is_merged: bool


class Network:
    """A model without weights: those outside the layers are loaded at once, those of a layer by `load`.

    Args:
        checkpoint: the model.
        device: where it computes, in float32.
    Attributes:
        model: the model, in evaluation mode.
        layers: the modules of all lists of layers, in the order of their names.
        matrices: those that are loaded, by the address of their first weight.
        views: the loaded matrices of the checkpoint by name, in float32, as they are multiplied with.
    Raises:
        FormatError: a tensor is missing or has another shape.
        UnsupportedError: transformers does not know the model, or rearranges its tensors.
    """

    def __init__(self, checkpoint: Checkpoint, device: TorchDevice) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self.model = empty_model(checkpoint)
        self._sources = _sources(self.model, checkpoint)
        self._ties = _ties(self.model, self._sources)
        self.layers = tuple(_layers(self.model))
        self.matrices: dict[int, Matrix] = {}
        self.views: dict[str, Tensor] = {}
        self._places: dict[str, tuple[nn.Parameter, tuple[int | slice, ...]]] = {}
        names = {id(module): name for name, module in self.model.named_modules()}
        self._inner: list[str] = [names[id(layer)] + "." for layer in self.layers]
        for name, buffer in self.model.named_buffers():
            stored = self._sources.get(name)
            value = buffer if stored is None else self._read(name, stored, tuple(buffer.shape)).to(buffer.dtype)
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[leaf] = value.to(device.place)
        self._load(name for name, _ in _parameters(self.model) if not name.startswith(tuple(self._inner)))

    @property
    def names(self) -> list[str]:
        """The names of the layers."""
        return [prefix.rstrip(".") for prefix in self._inner]

    @property
    def place(self) -> torch.device:
        """Where it computes."""
        return self._device.place

    def shapes(self) -> list[list[tuple[int, int]]]:
        """The shapes of all matrices, whether they are loaded or not: those outside the layers, then of each layer."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(1 + len(self.layers))]
        for name, parameter in self.model.named_parameters():
            layer = next((index for index, prefix in enumerate(self._inner) if name.startswith(prefix)), -1)
            if parameter.dim() > 1:
                rows, columns = parameter.shape[-2:]
                found[1 + layer] += [(rows, columns)] * (parameter.numel() // max(1, rows * columns))
        return found

    def matrix_at(self, weight: Tensor) -> Matrix | None:
        """The matrix that a tensor is, or None if it is not a loaded one or a part of one."""
        found = self.matrices.get(weight.data_ptr())
        return found if found is not None and weight.dim() == 2 and weight.numel() == _size(found) else None

    def gradient(self, name: str) -> Tensor | None:
        """The gradient of a loaded matrix of the checkpoint, or None if none was passed to it."""
        parameter, place = self._places[name]
        return None if parameter.grad is None else parameter.grad[place]

    def check_apart(self) -> None:
        """Check that no layer has parameters that others use too.

        Raises:
            UnwalkableError: one has.
        """
        users: dict[int | str, str] = {}
        for name, parameter in _parameters(self.model):
            layer = next((prefix for prefix in self._inner if name.startswith(prefix)), "")
            for key in (id(parameter), self._ties.get(name, name)):
                if users.setdefault(key, layer) != layer:
                    raise UnwalkableError(f"{name}: it belongs to several layers")

    def weights(self) -> int:
        """How many the parameters are, those that are tied counted once."""
        sources = {self._ties.get(name, name) for name, _ in _parameters(self.model)}
        return sum(self.model.get_parameter(name).numel() for name in sources)

    def load_all(self) -> None:
        """Load the weights of all layers; `release` cannot undo it where layers share parameters."""
        self._load(name for name, parameter in _parameters(self.model) if parameter.is_meta)

    def load(self, index: int) -> None:
        """Load the weights of a layer."""
        self._load(name for name, _ in _parameters(self.model) if name.startswith(self._inner[index]))

    def release(self, index: int) -> None:
        """Let the weights of a layer go."""
        for name, parameter in _parameters(self.model):
            if not name.startswith(self._inner[index]) or parameter.is_meta:
                continue
            for address in _addresses(parameter):
                for piece in self.matrices.pop(address).pieces:
                    del self.views[piece.name], self._places[piece.name]
            self._set(name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _load(self, names: Iterator[str]) -> None:
        loaded: dict[str, nn.Parameter] = {}
        for name in names:
            source = self._ties.get(name, name)
            if source not in loaded:
                loaded[source] = self._parameter(source)
            self._set(name, loaded[source])

    def _parameter(self, name: str) -> nn.Parameter:
        shape = tuple(self.model.get_parameter(name).shape)
        if name not in self._sources:
            raise FormatError(f"{self._checkpoint.path} has no tensor for {name}, of shape {list(shape)}")
        source = self._sources[name]
        parameter = nn.Parameter(self._read(name, source, shape), requires_grad=False)
        matrices = self._matrices(name, source, shape)
        for member, (address, matrix) in enumerate(zip(_addresses(parameter), matrices, strict=True)):
            self.matrices[address] = matrix
            for piece in matrix.pieces:
                rows = slice(piece.begin, piece.end)
                place = (rows,) if len(shape) == 2 else (member, rows)
                self._places[piece.name] = parameter, place
                self.views[piece.name] = parameter.detach()[place]
        return parameter

    def _read(self, name: str, source: _Source, shape: tuple[int, ...]) -> Tensor:
        read = self._checkpoint.read_weights
        parts = [[self._device.put(read(part)) for part in names] for names in source.members]
        members = [torch.cat(rows) if len(rows) > 1 else rows[0] for rows in parts]
        found = torch.stack(members) if source.is_merged else members[0]
        if tuple(found.shape) != shape:
            name, size = source.members[0][0], list(found.shape)
            raise FormatError(f"{name}: config.json asks for shape {list(shape)}, found {size}")
        return found

    def _matrices(self, name: str, source: _Source, shape: tuple[int, ...]) -> list[Matrix]:
        if len(shape) == 2:
            return [Matrix((Piece(source.members[0][0], 0, shape[0]),), (shape[0], shape[1]))]
        if len(shape) != 3:
            return []
        found = []
        for index in range(shape[0]):
            names = source.members[index] if source.is_merged else (layout.member_name(source.members[0][0], index),)
            rows = [self._checkpoint.tensors[part].shape[0] for part in names] if source.is_merged else [shape[1]]
            ends = [sum(rows[: place + 1]) for place in range(len(rows))]
            pieces = tuple(Piece(*item) for item in zip(names, [0, *ends], ends, strict=False))
            found.append(Matrix(pieces, (shape[1], shape[2]), stack=name))
        return found

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        self.model.get_submodule(owner)._parameters[leaf] = parameter


def read_config(checkpoint: Checkpoint) -> Any:
    """The configuration of a checkpoint, as transformers knows it.

    Raises:
        UnsupportedError: transformers does not know the kind of model.
    """
    stored = checkpoint.config
    if stored.get("model_type") not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"{checkpoint.path}: transformers {transformers.__version__} does not know the model_type "
            f"{stored.get('model_type')!r}; compress it without calibration"
        )
    known = CONFIG_MAPPING[stored["model_type"]]
    plain = {key: value for key, value in stored.items() if key != "quantization_config"}
    # JSON has no infinity, as in the limits of Mamba's steps; transformers writes it in a form of its own.
    return known.from_dict(known._decode_special_floats(plain))


def empty_model(checkpoint: Checkpoint) -> Any:
    """The model without weights, with its buffers.

    Raises:
        UnsupportedError: transformers does not know the model.
    """
    config = read_config(checkpoint)
    # Experts one by one, since each has tokens of its own.
    config._experts_implementation = "eager"
    # A layer that is run again must not find what it left in a cache.
    config.use_cache = False
    architecture = (checkpoint.config.get("architectures") or [""])[0]
    model_class: Any = getattr(transformers, architecture, None) or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise UnsupportedError(
            f"{checkpoint.path}: transformers {transformers.__version__} does not know the architecture "
            f"{architecture!r}; compress it without calibration"
        )
    with init_empty_weights(include_buffers=False):
        model: Any = model_class(config)
    return model.eval()


def _sources(model: Any, checkpoint: Checkpoint) -> dict[str, _Source]:
    """What each parameter and buffer is made of, by its name."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = model.state_dict()
    found: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        if layout.is_transposed(name):
            raise UnsupportedError(
                f"{checkpoint.path}: {name} is a matrix that transformers holds transposed, which calibration cannot "
                "follow; compress the model without it"
            )
        member = layout.stack_member(name)
        stored = name if member is None else member[0]
        path, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
        if path not in known and stored in known:
            path, pattern = stored, None
        if path in known:
            found.setdefault(path, {}).setdefault(pattern, []).append(name)
    sources = {}
    for path, names in found.items():
        flat = [name for members in names.values() for name in members]
        if None in names:
            if all(layout.stack_member(name) for name in flat):
                sources[path] = _Source(tuple((name,) for name in flat), is_merged=True)
                continue
            if len(flat) > 1:
                raise FormatError(f"{path}: several tensors of {checkpoint.path} belong to it: {', '.join(flat)}")
            sources[path] = _Source(((flat[0],),), is_merged=False)
            continue
        converter = by_pattern[next(iter(pattern for pattern in names if pattern is not None))]
        operations = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
        ordered = [names.get(pattern, []) for pattern in converter.source_patterns]
        if operations not in _FOLLOWED or len({len(members) for members in ordered}) != 1:
            made = ", ".join(kind.__name__ for kind, _ in operations)
            raise UnsupportedError(
                f"{flat[0]}: transformers makes {path} of it by {made}, which calibration cannot follow; "
                "compress the model without it"
            )
        sources[path] = _Source(tuple(zip(*ordered, strict=True)), is_merged=True)
    return sources


def _ties(model: Any, sources: Mapping[str, _Source]) -> dict[str, str]:
    """The parameter that serves in place of each that is not stored."""
    ties: dict[str, str] = {}
    pairs = list(model.all_tied_weights_keys.items())
    for target, source in pairs:
        if target not in sources and source in sources:
            ties[target] = source
        elif source not in sources and target in sources:
            ties[source] = target
    for target, source in pairs:
        if target not in sources and source in ties:
            ties[target] = ties[source]
    return ties


def _layers(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules with parameters; lists of lists are no layers but hold some."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList) and not any(isinstance(layer, nn.ModuleList) for layer in child):
            found += [layer for layer in child if any(True for _ in layer.parameters())]
        else:
            found += _layers(child)
    return found


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All parameters, those that are tied under each of their names."""
    return list(model.named_parameters(remove_duplicate=False))


def _addresses(parameter: Tensor) -> list[int]:
    """Where the matrices of a parameter begin."""
    if parameter.dim() == 2:
        return [parameter.data_ptr()]
    if parameter.dim() == 3:
        size = parameter.stride(0) * parameter.element_size()
        return [parameter.data_ptr() + index * size for index in range(len(parameter))]
    return []


def _size(matrix: Matrix) -> int:
    return matrix.shape[0] * matrix.shape[1]
