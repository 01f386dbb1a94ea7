"""Which parameter of a model each matrix of a checkpoint belongs to, by the rules of transformers."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
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

from entrollm.compress.stacks import find_stacks
from entrollm.errors import FormatError, UnsupportedError
from entrollm.format import layout


@dataclass(frozen=True)
class Place:
    """A parameter and the checkpoint's matrices that make it up.

    Attributes:
        path: the parameter's name in the model; of tied ones, that which the others are tied to.
        matrices: the names that lie below each other in each of its matrices; one of one for an ordinary parameter.
        is_stack: whether the parameter has three axes, the first over `matrices`.
    """

    path: str
    matrices: tuple[tuple[str, ...], ...]
    is_stack: bool

    def names(self) -> list[str]:
        """All names."""
        return [name for parts in self.matrices for name in parts]


def find_places(
    model: Any, shapes: Mapping[str, tuple[int, int]], kept: Iterable[str], are_equal: Callable[[str, str], bool]
) -> dict[str, Place]:
    """Find the parameters that matrices of a checkpoint belong to; matrices that the model lacks are left out.

    Args:
        model: on the meta device, its parameters not yet replaced. Parameters that its configuration ties, and that the
            checkpoint has twice with different values, are untied.
        shapes: the matrices by name.
        kept: the checkpoint's other tensors.
        are_equal: whether two matrices of the checkpoint have the same values.
    Returns:
        the places by the parameter that transformers loads the matrices as.
    Raises:
        FormatError: a matrix has another shape than its parameter.
        UnsupportedError: transformers rearranges a matrix in a way that coded weights cannot follow, or makes a
            parameter of coded and kept tensors.
    """
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
        member = layout.stack_member(name)
        path, pattern = locate(name if member is None else member[0])
        if path in parameters:
            found.setdefault(path, {}).setdefault(pattern, []).append(name)
    kept_paths = set()
    for name in kept:
        path, _ = locate(name)
        kept_paths.add(path)
        if path in found:
            raise UnsupportedError(
                f"{path} is made of {name}, which is kept in its type, and of coded matrices; code or keep all of them"
            )
    places = {}
    for path, names in found.items():
        place = _place(path, names, by_pattern)
        _check_shapes(place, shapes, tuple(parameters[path].shape))
        places[path] = place
    _settle_ties(model, places, kept_paths, are_equal)
    return places


def _settle_ties(
    model: Any, places: dict[str, Place], kept_paths: Container[str], are_equal: Callable[[str, str], bool]
) -> None:
    """Do what transformers does with tied parameters: one that is stored serves both, two that differ are untied."""
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in places and source not in places and source not in kept_paths:
            places[target] = replace(places[target], path=source)
        elif target in places and source in places:
            names = places[target].names(), places[source].names()
            if len(names[0]) == len(names[1]) and all(are_equal(*pair) for pair in zip(*names, strict=True)):
                del places[target]
            else:
                del model.all_tied_weights_keys[target]
        elif (target in places and source in kept_paths) or (target in kept_paths and source in places):
            # One is rounded and the other is not.
            del model.all_tied_weights_keys[target]


def _place(path: str, names: Mapping[str | None, list[str]], converters: Mapping[str, Any]) -> Place:
    if None in names:
        if len(names) == 1 and all(layout.stack_member(name) for name in names[None]):
            (members,) = find_stacks(names[None]).values()
            return Place(path, tuple((member,) for member in members), is_stack=True)
        if len(names) > 1 or len(names[None]) > 1:
            raise FormatError(f"{path}: several matrices of the folder belong to it: {', '.join(_flat(names))}")
        return Place(path, ((names[None][0],),), is_stack=False)
    patterns = [pattern for pattern in names if pattern is not None]
    converter = converters[patterns[0]]
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    if operations not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        rearranged = ", ".join(kind.__name__ for kind, _ in operations)
        raise UnsupportedError(
            f"{_flat(names)[0]}: transformers makes {path} of it by {rearranged}, which coded matrices cannot follow; "
            "keep it in its type (--keep, or keep=[...] of EntroConfig)"
        )
    ordered = [names.get(pattern, []) for pattern in converter.source_patterns]
    if len({len(members) for members in ordered}) != 1:
        raise FormatError(f"{path}: the folder does not have all matrices that belong to it, only {_flat(names)}")
    return Place(path, tuple(zip(*ordered, strict=True)), is_stack=True)


def _flat(names: Mapping[str | None, list[str]]) -> list[str]:
    return [name for members in names.values() for name in members]


def _check_shapes(place: Place, shapes: Mapping[str, tuple[int, int]], expected: tuple[int, ...]) -> None:
    for parts in place.matrices:
        rows, columns = sum(shapes[name][0] for name in parts), {shapes[name][1] for name in parts}
        found = (*(len(place.matrices),) * place.is_stack, rows, *columns)
        if found != expected:
            raise FormatError(
                f"{', '.join(parts)}: the model's {place.path} has shape {list(expected)}, the folder's {list(found)}; "
                "config.json belongs to another model"
            )


class StoredNames(WeightRenaming):
    """A renaming that only looks names up. Transformers applies renamings in turn, each to what the others made."""

    __slots__ = ("_names",)

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__("entrollm stored name", "entrollm stored name")
        self._names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new name, and no pattern."""
        return self._names.get(source_key, source_key), None


class StoredEntries(WeightConverter):
    """A converter that only looks names up, and leaves entries as they are.

    Transformers makes an expression of the name of every entry that is only renamed, which takes longer than to load
    it; of a converter it makes a copy.
    """

    __slots__ = ("_names",)
    _PATTERN = "entrollm stored entry"

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__(self._PATTERN, self._PATTERN, [_AsStored()])
        self._names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new name, and the pattern that stands for this converter if it has one."""
        found = self._names.get(source_key)
        return (source_key, None) if found is None else (found, self._PATTERN)

    def __deepcopy__(self, memo: Any) -> StoredEntries:
        # Each entry gets a copy, which collects it.
        made = copy.copy(self)
        made.collected_tensors, made.layer_targets = defaultdict(list), defaultdict(set)
        return made


class _AsStored(ConversionOps):
    """Leaves an entry as it is."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The entry under its name in the model."""
        (entry,) = input_dict.values()
        return {kwargs["full_layer_name"]: entry}


def around(conversions: Iterable[Any], names: Mapping[str, str]) -> list[Any]:
    """Conversions that give the entries of coded matrices their names in the model and leave these alone otherwise.

    Args:
        conversions: the model's own.
        names: entry in the checkpoint to buffer of the model.
    """
    # In between, the entries have names that no pattern matches.
    marks = {entry: f"\x00{index}" for index, entry in enumerate(names)}
    return [StoredNames(marks), StoredEntries({mark: names[entry] for entry, mark in marks.items()}), *conversions]
