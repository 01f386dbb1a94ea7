"""What Hugging Face's tensors are made of in a GGUF file: a tensor, an expert of a stack, or two tensors row by row."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.gguf_architecture import Architecture
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
_MAX_EXPERTS = 2**16


@dataclass(frozen=True, slots=True)
class Source:
    """What a tensor is made of.

    Attributes:
        tensors: one tensor of the file, or two of one type and shape, whose rows (or numbers of a row) are joined.
        alternates: rows of two tensors alternate; else all of the first come first.
        rows: the range of the rows that are used; None for all.
        expert: of a stack, the place of the matrix in it; None if the tensor is whole.
        is_row: a vector is a matrix of one row.
        is_kernel: a matrix is the kernel of a convolution of each channel by itself.
    """

    tensors: tuple[str, ...]
    expert: int | None = None
    is_row: bool = False
    is_kernel: bool = False
    alternates: bool = True
    rows: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The first tensor, for errors."""
        return self.tensors[0]

    def type(self, file: GgufFile) -> str:
        """The type of its blocks."""
        return file.tensors[self.name].type.name

    def entry(self, file: GgufFile) -> Entry:
        """Its type, shape and bytes; quantized matrices are U8 (rows, bytes of a row)."""
        tensor = file.tensors[self.name]
        shape, size = tensor.shape, tensor.end - tensor.begin
        if self.expert is not None:
            shape, size = shape[1:], size // shape[0]
        begin = tensor.begin + (self.expert or 0) * size
        if self.rows is not None:
            first, last = self.rows
            row_bytes = size // shape[0]
            begin, size, shape = begin + first * row_bytes, (last - first) * row_bytes, (last - first, *shape[1:])
        if self.is_row:
            shape = (1, *shape)
        if self.is_kernel:
            shape = (shape[0], 1, *shape[1:])
        if len(self.tensors) == 2:
            joins_rows = self.expert is not None or not self.alternates
            shape = (2 * shape[0], *shape[1:]) if joins_rows else (*shape[:-1], 2 * shape[-1])
            size *= 2
        if tensor.type.name in FLOAT_TYPES:
            return Entry(tensor.type.name, shape, begin, begin + size)
        rows = math.prod(shape[:-1])
        return Entry("U8", (rows, size // rows), begin, begin + size)

    def array(self, file: GgufFile) -> NDArray[Any]:
        """The tensor as its entry says; a view where it is one tensor."""
        parts = [self._part(file, name) for name in self.tensors]
        if len(parts) == 1:
            return parts[0]
        if not self.alternates:
            return np.concatenate(parts)
        axis = 1 if self.expert is not None else -1
        return np.stack(parts, axis=axis).reshape(self.entry(file).shape)

    def _part(self, file: GgufFile, name: str) -> NDArray[Any]:
        array = file.array(name)
        if self.expert is not None:
            experts = file.tensors[name].shape[0]
            array = array.reshape(experts, -1, array.shape[-1])[self.expert]
        if self.rows is not None:
            array = array[slice(*self.rows)]
        if self.is_kernel:
            return array[:, None]
        return array[None] if self.is_row else array


def find_sources(
    file: GgufFile, architecture: Architecture, left_out: frozenset[str], split_rows: tuple[int, ...]
) -> dict[str, Source]:
    """The tensors of a file by Hugging Face's names.

    Args:
        file: the file.
        architecture: what its tensors are called.
        left_out: tensors that have no name there.
        split_rows: the rows of each part of a tensor that the architecture splits.
    Raises:
        FormatError: a stack of experts has another shape, or lacks the one that it belongs with; a tensor to split has
            other rows than its parts; or two tensors have one name.
        UnsupportedError: a tensor is not part of the architecture.
    """
    found: dict[str, Source] = {}
    for name in file.tensors:
        if name not in left_out:
            for ours, source in _rename(file, name, architecture, split_rows).items():
                if ours in found:
                    raise FormatError(
                        f"{file.path}: tensors {found[ours].name!r:.80} and {name!r:.80} are both {ours} of the model; "
                        "expected one; convert the model again"
                    )
                found[ours] = source
    return found


def _rename(file: GgufFile, name: str, architecture: Architecture, split_rows: tuple[int, ...]) -> dict[str, Source]:
    match = _NAME.fullmatch(name)
    if match is not None:
        layer, part, kind = match["layer"], match["part"], match["kind"]
        outer = architecture.outer.get(part) or _OUTER.get(part)
        if layer is None and outer is not None:
            return {f"{outer}.{kind}": Source((name,))}
        if layer is not None:
            prefix = f"{architecture.layers}{int(layer)}."
            if parts := architecture.split.get(part):
                return _split(file, name, [f"{prefix}{ours}.{kind}" for ours in parts], split_rows)
            if ours := architecture.whole_names.get(f"{part}.{kind}"):
                return _named(file, name, prefix + ours, architecture)
            if ours := architecture.parts.get(part) or _INNER.get(part):
                return _named(file, name, f"{prefix}{ours}.{kind}", architecture)
    raise UnsupportedError(f"{file.path}: tensor {name!r:.80} is not part of a supported architecture")


def _split(file: GgufFile, name: str, parts: list[str], rows: tuple[int, ...]) -> dict[str, Source]:
    """The parts of a tensor, one after the other."""
    shape = file.tensors[name].shape
    if shape[0] != sum(rows):
        raise FormatError(
            f"{file.path}: tensor {name!r} has {shape[0]} rows, and its parts have {' + '.join(map(str, rows))}"
        )
    ends = itertools.accumulate(rows)
    return {ours: Source((name,), rows=(end - size, end)) for ours, size, end in zip(parts, rows, ends, strict=True)}


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
    shape = file.tensors[name].shape
    alternates = not name.endswith(tuple(architecture.following.values()))
    if "{}" not in ours:
        is_row = len(shape) == 1 and ours.endswith(architecture.rows)
        is_kernel = len(shape) == 2 and ours.endswith(architecture.kernels)
        return {ours: Source(tensors, is_row=is_row, is_kernel=is_kernel, alternates=alternates)}
    if len(shape) != 3 or shape[0] > _MAX_EXPERTS:
        raise FormatError(
            f"{path}: tensor {name!r} has shape {list(shape)}, expected a stack of experts with three axes"
        )
    return {ours.format(expert): Source(tensors, expert, alternates=alternates) for expert in range(shape[0])}


def _lacks(path: Path, name: str, other: str) -> dict[str, Source]:
    raise FormatError(f"{path}: tensor {name!r} is there without the layer's {other!r}")
