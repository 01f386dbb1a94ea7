"""What Hugging Face's tensors are made of in a GGUF file: a tensor, an expert of a stack, or two tensors row by row."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.gguf_architecture import Architecture
from entrollm.checkpoint.gguf_changes import Change, Changes
from entrollm.errors import FormatError, UnsupportedError
from entrollm.files.gguf import FLOAT_TYPES, GgufFile
from entrollm.files.safetensors import Entry

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(?P<layer>0|[1-9][0-9]{0,3})\.)?(?P<part>\w+(?:\.\w+)?)\.(?P<kind>weight|bias)")
_PLACE = re.compile(r"blk\.(?P<layer>0|[1-9][0-9]{0,3})\.(?P<end>.+)")
_MAX_EXPERTS = 2**16


@dataclass(frozen=True, slots=True)
class Source:
    """What a tensor is made of.

    Attributes:
        tensors: one tensor of the file, or two of one type and shape, whose rows (or numbers of a row) are joined; with
            a change, those that it takes.
        alternates: rows of two tensors alternate; else all of the first come first.
        expert: of a stack, the place of the matrix in it; None if the tensor is whole.
        is_row: a vector is a matrix of one row.
        is_kernel: a matrix is the kernel of a convolution of each channel by itself.
        change: what is then done to it; None if nothing is.
        offset: what is subtracted at last.
    """

    tensors: tuple[str, ...]
    expert: int | None = None
    is_row: bool = False
    is_kernel: bool = False
    alternates: bool = True
    change: Change | None = None
    offset: float = 0.0

    @property
    def name(self) -> str:
        """The first tensor, for errors."""
        return self.tensors[0]

    def type(self, file: GgufFile) -> str:
        """The type of its blocks."""
        return file.tensors[self.name].type.name if self.change is None else self._form(file, self.change)[0]

    def entry(self, file: GgufFile) -> Entry:
        """Its type, shape and bytes; quantized matrices are U8 (rows, bytes of a row).

        Raises:
            FormatError: the shapes of the tensors do not go together.
        """
        if self.change is not None:
            return self._changed_entry(file, self.change)
        tensor, shape = file.tensors[self.name], self.shape(file)
        size = tensor.end - tensor.begin
        if self.expert is not None:
            size //= tensor.shape[0]
        begin = tensor.begin + (self.expert or 0) * size
        if len(self.tensors) == 2:
            is_longer = self.expert is not None or not self.alternates
            shape = (2 * shape[0], *shape[1:]) if is_longer else (*shape[:-1], 2 * shape[-1])
            size *= 2
        if tensor.type.name in FLOAT_TYPES:
            return Entry(tensor.type.name, shape, begin, begin + size)
        rows = math.prod(shape[:-1])
        return Entry("U8", (rows, size // rows), begin, begin + size)

    def array(self, file: GgufFile) -> NDArray[Any]:
        """The tensor as its entry says; a view where it is one tensor that is not changed.

        Raises:
            FormatError: it holds what no model has.
        """
        array = self._joined(file)
        return array.astype(np.float32) - np.float32(self.offset) if self.offset else array

    def _joined(self, file: GgufFile) -> NDArray[Any]:
        parts = [self._part(file, name) for name in self.tensors]
        if self.change is not None:
            with _naming(file, self.name):
                return self.change.apply(tuple(file.tensors[name].type.name for name in self.tensors), parts)
        if len(parts) == 1:
            return parts[0]
        if not self.alternates:
            return np.concatenate(parts)
        axis = 1 if self.expert is not None else -1
        return np.stack(parts, axis=axis).reshape(self.entry(file).shape)

    def _form(self, file: GgufFile, change: Change) -> tuple[str, tuple[int, ...]]:
        """The type and shape that a change makes."""
        kinds = tuple(file.tensors[name].type.name for name in self.tensors)
        shapes = tuple(replace(self, tensors=(name,), change=None).shape(file) for name in self.tensors)
        with _naming(file, self.name):
            return change.form(kinds, shapes)

    def _changed_entry(self, file: GgufFile, change: Change) -> Entry:
        kind, shape = self._form(file, change)
        first = replace(self, tensors=(self.name,), change=None).entry(file)
        if kind in FLOAT_TYPES:
            size = math.prod(shape) * FLOAT_TYPES[kind].itemsize
            return Entry(kind, shape, first.begin, first.begin + size)
        rows, row_bytes = math.prod(shape[:-1]), first.shape[-1]
        return Entry("U8", (rows, row_bytes), first.begin, first.begin + rows * row_bytes)

    def shape(self, file: GgufFile) -> tuple[int, ...]:
        """The shape of one tensor, or of an expert of it, in weights."""
        shape = file.tensors[self.name].shape
        if self.expert is not None:
            shape = shape[1:]
        if self.is_row:
            shape = (1, *shape)
        return (shape[0], 1, *shape[1:]) if self.is_kernel else shape

    def _part(self, file: GgufFile, name: str) -> NDArray[Any]:
        array = file.array(name)
        if self.expert is not None:
            experts = file.tensors[name].shape[0]
            array = array.reshape(experts, -1, array.shape[-1])[self.expert]
        if self.is_kernel:
            return array[:, None]
        return array[None] if self.is_row else array


@contextmanager
def _naming(file: GgufFile, name: str) -> Iterator[None]:
    """Say in errors which tensor they are about."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{file.path}: tensor {name!r:.80} {error}") from None


def find_sources(
    file: GgufFile, architecture: Architecture, left_out: frozenset[str], changes: Changes
) -> dict[str, Source]:
    """The tensors of a file by Hugging Face's names.

    Args:
        file: the file.
        architecture: what its tensors are called.
        left_out: tensors that have no name there.
        changes: what else is done to tensors of layers.
    Raises:
        FormatError: a stack of experts has another shape, or lacks the one that it belongs with; or two tensors have
            one name.
        UnsupportedError: a tensor is not part of the architecture.
    """
    found: dict[str, Source] = {}
    for name in file.tensors:
        if name not in left_out:
            for ours, source in _rename(file, name, architecture, changes).items():
                if ours in found:
                    raise FormatError(
                        f"{file.path}: tensors {found[ours].name!r:.80} and {name!r:.80} are both {ours} of the model; "
                        "expected one; convert the model again"
                    )
                is_norm = ours.endswith("norm.weight") and not ours.endswith(architecture.plain_norms)
                found[ours] = replace(source, offset=architecture.norm_offset) if is_norm else source
    return found


def _rename(file: GgufFile, name: str, architecture: Architecture, changes: Changes) -> dict[str, Source]:
    place = _PLACE.fullmatch(name)
    if place is not None:
        prefix, end = f"{architecture.layers}{int(place['layer'])}.", place["end"]
        if end in changes:
            found: dict[str, Source] = {}
            for ours, change in changes[end].items():
                found |= _changed(file, name.removesuffix(end), end, prefix + ours, architecture, change)
            return found
        for first, made in changes.items():
            if any(end in change.others for change in made.values()):
                other = name.removesuffix(end) + first
                return {} if other in file.tensors else _lacks(file.path, name, first)
        if whole := architecture.whole_names.get(end):
            return _named(file, name, prefix + whole, architecture)
    match = _NAME.fullmatch(name)
    if match is not None:
        layer, part, kind = match["layer"], match["part"], match["kind"]
        outer = architecture.outer.get(part) or _OUTER.get(part)
        if layer is None and outer is not None:
            return {f"{outer}.{kind}": Source((name,))}
        inner = architecture.parts.get(part) or _INNER.get(part)
        if layer is not None and inner is not None:
            return _named(file, name, f"{architecture.layers}{int(layer)}.{inner}.{kind}", architecture)
    raise UnsupportedError(f"{file.path}: tensor {name!r:.80} is not part of a supported architecture")


def _named(file: GgufFile, name: str, ours: str, architecture: Architecture) -> dict[str, Source]:
    """The tensor of this name, or all experts where the name has a place for their number."""
    tensors: tuple[str, ...] = (name,)
    path = file.path
    for second, first in {**architecture.alternating, **architecture.following}.items():
        if name.endswith(second):  # its rows belong to the first one's
            return {} if name.removesuffix(second) + first in file.tensors else _lacks(path, name, first)
        if name.endswith(first):
            other = name.removesuffix(first) + second
            if other not in file.tensors:
                return _lacks(path, name, second)
            if (file.tensors[other].type, file.tensors[other].shape) != (
                file.tensors[name].type,
                file.tensors[name].shape,
            ):
                raise FormatError(f"{path}: tensors {name!r} and {other!r} differ in type or shape")
            tensors = (name, other)
    alternates = not name.endswith(tuple(architecture.following.values()))
    return _placed(file, ours, architecture, Source(tensors, alternates=alternates))


def _changed(
    file: GgufFile, layer: str, end: str, ours: str, architecture: Architecture, change: Change
) -> dict[str, Source]:
    """The tensor of this name as a change makes it of one of a layer, or all experts."""
    for other in change.others:
        if layer + other not in file.tensors:
            return _lacks(file.path, layer + end, other)
    tensors = tuple(layer + each for each in (end, *change.others))
    return _placed(file, ours, architecture, Source(tensors, change=change))


def _placed(file: GgufFile, ours: str, architecture: Architecture, source: Source) -> dict[str, Source]:
    """The tensor of this name, or all experts where the name has a place for their number."""
    shape = file.tensors[source.name].shape
    if "{}" not in ours:
        is_row = len(shape) == 1 and ours.endswith(architecture.rows)
        is_kernel = len(shape) == 2 and ours.endswith(architecture.kernels)
        return {ours: replace(source, is_row=is_row, is_kernel=is_kernel)}
    if len(shape) != 3 or shape[0] > _MAX_EXPERTS:
        raise FormatError(
            f"{file.path}: tensor {source.name!r} has shape {list(shape)}, expected a stack of experts with three axes"
        )
    return {ours.format(expert): replace(source, expert=expert) for expert in range(shape[0])}


def _lacks(path: Path, name: str, other: str) -> dict[str, Source]:
    raise FormatError(f"{path}: tensor {name!r} is there without the layer's {other!r}")
