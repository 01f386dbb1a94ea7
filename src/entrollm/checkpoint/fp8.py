"""fp8 weights and the tensors that scale them.

DeepSeek and transformers store `<weight>_scale_inv`, one float for each block of (usually) 128 x 128;
compressed-tensors and FBGEMM store `<weight>_scale`, one float per tensor or per row. Both multiply.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.errors import FormatError, UnsupportedError
from entrollm.files.dtypes import to_float32

Float32 = NDArray[np.float32]

FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})
SCALE_DTYPES = frozenset({"F32", "F16", "BF16", "F8_E8M0"})
_DEFAULT_BLOCK = (128, 128)
# Cut blocks stay a multiple of this, for which there are kernels.
_MULTIPLE = 128
_ACTIVATION_SCALES = (".input_scale", ".activation_scale")


@dataclass(frozen=True)
class BlockScales:
    """The scales of one fp8 weight. Each multiplies a block of rows and columns.

    Attributes:
        scale: float32, shape (row blocks, column blocks).
        block_shape: rows and columns of a block; the last blocks may be cut short.
    """

    scale: Float32
    block_shape: tuple[int, int]

    def apply(self, values: Float32, first_row: int) -> None:
        """Multiply rows of the weight by their scales, in place.

        Args:
            values: shape (rows, columns).
            first_row: the row of the weight that values[0] is.
        """
        block_rows, block_columns = self.block_shape
        rows, columns = values.shape
        row = 0
        while row < rows:
            block = (first_row + row) // block_rows
            stop = min(rows, (block + 1) * block_rows - first_row)
            values[row:stop] *= np.repeat(self.scale[block], block_columns)[:columns]
            row = stop


def find_scales(dtypes: Mapping[str, str]) -> tuple[dict[str, str], frozenset[str]]:
    """Find the tensors that belong to fp8 weights.

    Args:
        dtypes: every tensor's name and safetensors dtype.
    Returns:
        the scale tensor of each fp8 weight that has one, and the names of all tensors that are not weights: these
        scales, and the activation scales of the same layers, which weights do not need.
    Raises:
        FormatError: a weight has scales of both kinds.
    """
    scale_names: dict[str, str] = {}
    consumed: set[str] = set()
    for name, dtype in dtypes.items():
        if dtype not in FP8_DTYPES:
            continue
        found = [name + suffix for suffix in ("_scale_inv", "_scale") if name + suffix in dtypes]
        if len(found) == 2:
            raise FormatError(f"tensor {name!r} has two scales, {found[0]!r} and {found[1]!r}; expected one")
        if found:
            scale_names[name] = found[0]
            consumed.add(found[0])
        layer = name.removesuffix(".weight")
        consumed.update(layer + suffix for suffix in _ACTIVATION_SCALES if layer + suffix in dtypes)
    return scale_names, frozenset(consumed)


def read_scales(name: str, shape: Sequence[int], scale: NDArray[Any], block_shape: object) -> BlockScales:
    """Interpret the scale tensor of an fp8 weight.

    Args:
        name: the weight, for errors.
        shape: the weight's shape.
        scale: a scalar, (1,), (rows,), (rows, 1) or (row blocks, column blocks).
        block_shape: `weight_block_size` of the checkpoint's quantization_config; None for 128 x 128.
    Raises:
        FormatError: the scale has another shape.
        UnsupportedError: a weight that is not a matrix has more than one scale.
    """
    scale = to_float32(scale)
    if len(shape) != 2:
        if scale.size == 1 and len(shape) > 0:
            return BlockScales(scale.reshape(1, 1), _whole(shape))
        raise UnsupportedError(
            f"tensor {name!r} of shape {tuple(shape)} is fp8 with scales of shape {scale.shape}; "
            "only matrices may have more than one scale"
        )
    rows, columns = shape
    if scale.size == 1:
        return BlockScales(scale.reshape(1, 1), _whole(shape))
    if scale.shape in ((rows,), (rows, 1)):
        return BlockScales(scale.reshape(rows, 1), (1, max(columns, 1)))
    blocks = _block_shape(name, block_shape)
    expected = (-(-rows // blocks[0]), -(-columns // blocks[1]))
    if scale.shape != expected:
        raise FormatError(
            f"tensor {name!r} of shape {(rows, columns)} is fp8 with scales of shape {scale.shape}; "
            f"expected one scale, one per row, or {expected} for blocks of {blocks[0]} x {blocks[1]}"
        )
    return BlockScales(scale, (_limited(blocks[0], rows), _limited(blocks[1], columns)))


def _limited(block: int, length: int) -> int:
    """The length of a block, without what lies far beyond the end of the weight."""
    return min(block, -(-length // _MULTIPLE) * _MULTIPLE)


def _whole(shape: Sequence[int]) -> tuple[int, int]:
    columns = 1
    for length in shape[1:]:
        columns *= length
    return max(shape[0], 1), max(columns, 1)


def _block_shape(name: str, block_shape: object) -> tuple[int, int]:
    if block_shape is None:
        return _DEFAULT_BLOCK
    match block_shape:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise FormatError(f"tensor {name!r}: weight_block_size must be two positive integers, found {block_shape!r}")
