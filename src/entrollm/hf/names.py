"""Find the parameter of a model that each matrix of a checkpoint belongs to, by the rules of transformers."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from entrollm.compress.stacks import find_stacks, is_transposed
from entrollm.errors import FormatError, Message, Option, UnsupportedError
from entrollm.format import layout


@dataclass(frozen=True)
class StoredParameter:
    """A parameter of a model and the checkpoint's matrices that it is made of.

    Attributes:
        path: the parameter's name in the model; of tied parameters, the one that the others are tied to.
        matrices: for each matrix of the parameter, the names of the checkpoint's matrices that lie one below the other
            in it. An ordinary parameter is one matrix with one name.
        is_stack: whether the parameter has three axes, the first over `matrices`.
        is_transposed: whether these are the transposes of what the parameter has.
    """

    path: str
    matrices: tuple[tuple[str, ...], ...]
    is_stack: bool
    is_transposed: bool = False

    def names(self) -> list[str]:
        """The names of all matrices in the checkpoint."""
        return [name for parts in self.matrices for name in parts]


def find_parameters(
    model: Any, shapes: Mapping[str, tuple[int, int]], kept: Collection[str], are_equal: Callable[[str, str], bool]
) -> dict[str, StoredParameter]:
    """Find the parameters that the matrices of a checkpoint belong to. Matrices that the model lacks are left out.

    Args:
        model: the model, on the meta device, before any parameter is replaced. Parameters that its configuration ties,
            and that the checkpoint has twice with different values, are untied.
        shapes: the shapes of the matrices by name.
        kept: the names of the checkpoint's other tensors.
        are_equal: whether two matrices of the checkpoint have the same values.
    Returns:
        the parameters, by the name under which transformers loads them.
    Raises:
        FormatError: a matrix and its parameter differ in shape.
        UnsupportedError: transformers rearranges a matrix in a way that coded weights do not support, or makes a
            parameter of coded and kept tensors.
    """
    _refuse_transposed((*shapes, *kept))
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = model.state_dict()

    def locate(name: str) -> tuple[str, str | None]:
        found, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        return (name, None) if found not in parameters and name in parameters else (found, pattern)

    found: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(shapes, key=dot_natural_key):
        member = layout.stack_member(name) or layout.transposed_member(name)
        path, pattern = locate(name if member is None else member[0])
        if path in parameters:
            found.setdefault(path, {}).setdefault(pattern, []).append(name)
    kept_paths = set()
    for name in kept:
        if layout.is_kept_member(name):
            raise UnsupportedError(
                f"{name} is a matrix of an expert that is kept in its type, and transformers holds those of all "
                "experts in one tensor; expected coded experts",
                hint=Message(
                    "compress the model without keeping it, or load what `entrollm export` makes of the folder"
                ),
            )
        path, _ = locate(name)
        kept_paths.add(path)
        if path in found:
            raise UnsupportedError(
                f"{path} is made of {name}, which is kept in its type, and of coded matrices; code or keep all of them"
            )
    stored = {}
    for path, names in found.items():
        parameter = _parameter(path, names, by_pattern)
        _check_shapes(parameter, shapes, tuple(parameters[path].shape))
        stored[path] = parameter
    _settle_ties(model, stored, kept_paths, are_equal)
    return stored


def _refuse_transposed(names: Iterable[str]) -> None:
    for name in names:
        if layout.transposed_matrix(name) is not None:
            raise UnsupportedError(
                f"{name} is the transpose of the matrix that transformers has, as GGUF files of GPT-2 hold it",
                hint=Message("load what `entrollm export` makes of the folder"),
            )


def _settle_ties(
    model: Any,
    stored: dict[str, StoredParameter],
    kept_paths: Container[str],
    are_equal: Callable[[str, str], bool],
) -> None:
    """Do what transformers does with tied parameters: one that is stored serves both, two that differ are untied."""
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in stored and source not in stored and source not in kept_paths:
            stored[target] = replace(stored[target], path=source)
        elif target in stored and source in stored:
            names = stored[target].names(), stored[source].names()
            if len(names[0]) == len(names[1]) and all(are_equal(*pair) for pair in zip(*names, strict=True)):
                del stored[target]
            else:
                del model.all_tied_weights_keys[target]
        elif (target in stored and source in kept_paths) or (target in kept_paths and source in stored):
            # One is rounded and the other is not.
            del model.all_tied_weights_keys[target]


def _parameter(path: str, names: Mapping[str | None, list[str]], converters: Mapping[str, Any]) -> StoredParameter:
    if None in names:
        if len(names) == 1 and all(layout.stack_member(n) or layout.transposed_member(n) for n in names[None]):
            (members,) = find_stacks(names[None]).values()
            matrices = tuple((member,) for member in members)
            return StoredParameter(path, matrices, is_stack=True, is_transposed=is_transposed(members))
        if len(names) > 1 or len(names[None]) > 1:
            raise FormatError(f"{path}: several matrices of the folder belong to it: {', '.join(_flat(names))}")
        return StoredParameter(path, ((names[None][0],),), is_stack=False)
    patterns = [pattern for pattern in names if pattern is not None]
    converter = converters[patterns[0]]
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    if operations not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        rearranged = ", ".join(kind.__name__ for kind, _ in operations)
        raise UnsupportedError(
            f"{_flat(names)[0]}: transformers makes {path} of it by {rearranged}, which coded matrices cannot follow",
            hint=Message("keep it in its type with {}", Option("keep", [_flat(names)[0]])),
        )
    ordered = [names.get(pattern, []) for pattern in converter.source_patterns]
    if len({len(members) for members in ordered}) != 1:
        raise FormatError(f"{path}: the folder does not have all matrices that belong to it, only {_flat(names)}")
    return StoredParameter(path, tuple(zip(*ordered, strict=True)), is_stack=True)


def _flat(names: Mapping[str | None, list[str]]) -> list[str]:
    return [name for members in names.values() for name in members]


def _check_shapes(parameter: StoredParameter, shapes: Mapping[str, tuple[int, int]], expected: tuple[int, ...]) -> None:
    for parts in parameter.matrices:
        rows, columns = sum(shapes[name][0] for name in parts), {shapes[name][1] for name in parts}
        sizes = (*columns, rows) if parameter.is_transposed else (rows, *columns)
        found = (*(len(parameter.matrices),) * parameter.is_stack, *sizes)
        if found != expected:
            raise FormatError(
                f"{', '.join(parts)}: the model's {parameter.path} has shape {list(expected)}, "
                f"the folder's {list(found)}; config.json belongs to another model"
            )


class StoredNames(WeightRenaming):
    """A renaming that looks names up.

    Transformers applies renamings one after another, each to the result of the one before.
    """

    __slots__ = ("_names",)

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__("entrollm stored name", "entrollm stored name")
        self._names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Rename an entry: its new name, and no pattern."""
        return self._names.get(source_key, source_key), None


class StoredEntries(WeightConverter):
    """A converter that looks names up, and leaves entries as they are.

    A renaming would do the same, but transformers compiles a regular expression for every renamed entry, which takes
    longer than loading it. A converter is only copied.
    """

    __slots__ = ("_names",)
    _PATTERN = "entrollm stored entry"

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__(self._PATTERN, self._PATTERN, [_AsStored()])
        self._names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Rename an entry: its new name, and the pattern of this converter; or its old name and `None`."""
        found = self._names.get(source_key)
        return (source_key, None) if found is None else (found, self._PATTERN)

    def __deepcopy__(self, memo: Any) -> StoredEntries:
        # Transformers makes a copy for each entry, to collect its tensors.
        made = copy.copy(self)
        made.collected_tensors, made.layer_targets = defaultdict(list), defaultdict(set)
        return made


class _AsStored(ConversionOps):
    """Leaves an entry as it is."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Return the entry under its name in the model."""
        (entry,) = input_dict.values()
        return {kwargs["full_layer_name"]: entry}


def around(conversions: Iterable[Any], names: Mapping[str, str]) -> list[Any]:
    """Add conversions that give the entries of coded matrices their names in the model, and hide them from the others.

    Args:
        conversions: the model's own conversions.
        names: buffers of the model by the name of the entry in the checkpoint.
    """
    # Between the two, entries have names that no pattern of the model's conversions matches.
    marks = {entry: f"\x00{index}" for index, entry in enumerate(names)}
    return [StoredNames(marks), StoredEntries({mark: names[entry] for entry, mark in marks.items()}), *conversions]
