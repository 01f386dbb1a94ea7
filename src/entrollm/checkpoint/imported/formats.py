"""The interface of a quantized source format, and what the formats share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from entrollm.errors import FormatError, Message, UnsupportedError
from entrollm.files.dtypes import DTYPES
from entrollm.files.safetensors import Entry
from entrollm.format.group_scales import GroupedKind, GroupScales

FLOAT_TYPES = ("F16", "BF16", "F32")
# Keys of a quantization_config that say that weights were rotated, and words for it in the names of algorithms.
_ROTATIONS = ("transform_config", "rotation_config", "spinquant_config", "hadamard_config")
_ROTATING = ("rotat", "quarot", "spinquant", "hadamard")
_TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ImportedWeights:
    """The integers of an imported matrix and their scales.

    Attributes:
        symbols: uint8, shape (rows, columns), columns in stored order.
        groups: how symbols become weights.
    """

    symbols: NDArray[np.uint8]
    groups: GroupScales


@dataclass(frozen=True)
class ImportedMatrix:
    """A matrix of a quantized checkpoint.

    Attributes:
        name: the weight's name in an ordinary checkpoint.
        shape: (rows, columns), each at least 1.
        dtype: the type that its own runtime dequantizes it to, by its safetensors name.
        sources: the tensors of the checkpoint that make it up.
        read: reads its integers and scales; raises FormatError if a source is malformed.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    sources: tuple[str, ...]
    read: Callable[[], ImportedWeights]


class RawTensors(Protocol):
    """The tensors of a checkpoint as its files hold them."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """All tensors by name."""

    def array(self, name: str) -> NDArray[Any]:
        """A read-only view of a tensor."""


class Format(Protocol):
    """A source format; each is a module of this package."""

    def recognise(self, quantization: Mapping[str, Any]) -> bool:
        """Whether a quantization_config is of this format."""

    def matrices(self, quantization: Mapping[str, Any], tensors: RawTensors) -> Iterator[ImportedMatrix]:
        """The quantized matrices of a checkpoint.

        Raises:
            FormatError: a matrix is malformed; the message names the tensor.
            UnsupportedError: the checkpoint uses a variant that is not supported.
        """


def matrix_shape(tensors: RawTensors, name: str, dtypes: tuple[str, ...]) -> tuple[int, int]:
    """The shape of a tensor that must be a matrix of one of these types, with at least one element.

    Raises:
        FormatError: the tensor is missing or not such a matrix.
    """
    entry = tensors.entries.get(name)
    if entry is None:
        raise FormatError(f"{name}: the tensor is missing, though others of its layer are there")
    if entry.dtype not in dtypes or len(entry.shape) != 2 or 0 in entry.shape:
        raise FormatError(
            f"{name}: expected a matrix of type {' or '.join(dtypes)}, found {entry.dtype} {list(entry.shape)}"
        )
    return entry.shape[0], entry.shape[1]


def integer_option(quantization: Mapping[str, Any], key: str, allowed: tuple[int, ...]) -> int:
    """An integer of a quantization_config.

    Raises:
        FormatError: it is missing or not an integer.
        UnsupportedError: it is not one of `allowed`.
    """
    value = quantization.get(key)
    if type(value) is not int:
        raise FormatError(f"config.json: quantization_config has {key} {value!r:.80}, expected an integer")
    if value not in allowed:
        raise UnsupportedError(f"config.json: quantization_config has {key} {value}; supported are {allowed}")
    return value


def refuse_rotations(source: object, quantization: Mapping[str, Any]) -> None:
    """Refuse weights that were rotated, since the model would have to rotate their inputs as well.

    Args:
        source: the file with the quantization_config, for errors.
        quantization: the quantization_config.
    Raises:
        UnsupportedError: they were; the message names the key that says it.
    """
    found = [key for key in _ROTATIONS if quantization.get(key)]
    algorithms = quantization.get("algo_config") or ()
    for algorithm in algorithms if isinstance(algorithms, list) else (algorithms,):
        if _rotates(algorithm):
            found.append("algo_config")
    if found:
        article = "an" if found[0].startswith("a") else "a"
        method = quantization.get("quant_method", quantization.get("method"))
        raise UnsupportedError(
            f"{source}: weights of {method!r:.40} with {article} {found[0]}, which rotates the weights and what "
            "they are multiplied with; this is not supported",
            hint=Message("use the original checkpoint"),
        )


def _rotates(algorithm: object) -> bool:
    """Whether an entry of Quark's algo_config rotates; it is a name, an object with one, or an object by names."""
    words = [algorithm]
    if isinstance(algorithm, dict):
        words = [key for key, value in algorithm.items() if value]
        words += [
            algorithm.get("name"),
            *(value.get("name") for value in algorithm.values() if isinstance(value, dict)),
        ]
    return any(isinstance(word, str) and part in word.lower() for word in words for part in _ROTATING)


def is_method(quantization: Mapping[str, Any], method: str) -> bool:
    """Whether a quantization_config names a method, under its usual key or gptqmodel's."""
    return bool(quantization.get("quant_method", quantization.get("method")) == method)


def layout_option(quantization: Mapping[str, Any], keys: tuple[str, ...], allowed: tuple[str, ...]) -> str:
    """The layout of quantized weights, in lower case; the first of `allowed` if no key is present.

    Args:
        quantization: the quantization_config.
        keys: keys that may name the layout; the first one that is present does.
        allowed: the layouts that are supported.
    Raises:
        UnsupportedError: the layout is not one of `allowed`.
    """
    layout = next((quantization[key] for key in keys if key in quantization), allowed[0])
    if not isinstance(layout, str) or layout.lower() not in allowed:
        raise UnsupportedError(f"config.json: quantized weights in the layout {layout!r:.80}; supported are {allowed}")
    return layout.lower()


def unpack_bits(words: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """Split rows of 32-bit words into fields, lowest bits first; a field may straddle two words.

    Args:
        words: int32 or uint32, shape (n, words), with at least `count * bits` bits in a row.
        bits: 1 to 8.
        count: fields in a row.
    Returns:
        uint8, shape (n, count).
    """
    rows = len(words)
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(rows, words.shape[1] * 4)
    if bits == 8:
        return octets[:, :count].copy()
    if bits in (1, 2, 4):
        fields = octets[:, :, None] >> np.arange(0, 8, bits, dtype=np.uint8)
        fields &= np.uint8((1 << bits) - 1)
        return fields.reshape(rows, -1)[:, :count]
    planes = np.unpackbits(octets, axis=1, count=count * bits, bitorder="little").reshape(rows, count, bits)
    return np.packbits(planes, axis=2, bitorder="little").reshape(rows, count)


def floats(tensors: RawTensors, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Scales or float zeros, in their own type, checked to be finite.

    Raises:
        FormatError: the tensor is missing, has another type or shape, or has a value that is not finite.
    """
    entry = tensors.entries.get(name)
    if entry is None:
        raise FormatError(f"{name}: the tensor is missing, though others of its layer are there")
    if entry.dtype not in FLOAT_TYPES or entry.shape != shape:
        raise FormatError(
            f"{name}: expected shape {list(shape)} of {', '.join(FLOAT_TYPES)}, found {entry.dtype} {list(entry.shape)}"
        )
    values = tensors.array(name)
    if not np.isfinite(values.astype(np.float32)).all():
        raise FormatError(f"{name}: it has a value that is not finite")
    return values


def group_scales(form: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], zero: int | None = None) -> GroupScales:
    """Make group scales; the types in their form are those of the arrays.

    Args:
        form: the fields of GroupedKind without its types and its zero.
        arrays: by a name of GROUP_ARRAY_TYPES. Group zeros that are all equal become one zero.
        zero: the zero of all groups; None if the arrays hold zeros, or absent.
    """
    kept = dict(arrays)
    zeros = kept.get("group_zero")
    if zeros is not None and zeros.dtype == np.uint8 and (zeros == zeros.flat[0]).all():
        zero = int(kept.pop("group_zero").flat[0])
    types = {name: _TYPE_NAMES[array.dtype] for name, array in kept.items()}
    contiguous = {name: np.ascontiguousarray(array) for name, array in kept.items()}
    return GroupScales(GroupedKind(types=types, zero=zero, **form), contiguous)


def sort_groups(name: str, group_index: NDArray[Any], groups: int) -> tuple[int, NDArray[np.uint32] | None]:
    """Find the order of columns that makes scale groups contiguous.

    Args:
        name: the index tensor, for errors.
        group_index: the group of each column: integers, shape (columns,).
        groups: the number of groups.
    Returns:
        the columns in a group, and the order, uint32 (columns,), or None if the columns are in order already.
    Raises:
        FormatError: a group is out of range.
        UnsupportedError: the groups differ in size; only the last one may be smaller.
    """
    if group_index.min() < 0 or group_index.max() >= groups:
        raise FormatError(f"{name}: group {group_index.max()} is out of range, there are {groups}")
    counts = np.bincount(group_index, minlength=groups)
    size = int(counts[0])
    if (counts[:-1] != size).any() or not 0 < counts[-1] <= size:
        raise UnsupportedError(f"{name}: its groups have {counts.min()} to {counts.max()} columns, expected one size")
    order = np.argsort(group_index, kind="stable").astype(np.uint32)
    return size, None if (np.diff(group_index) >= 0).all() else order
