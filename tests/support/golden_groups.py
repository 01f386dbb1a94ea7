"""What the golden file of group scales holds: every array and option of theirs, in small numbers written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.format import layout
from entrollm.format.blocks import Blocks
from entrollm.format.code import Code, Field
from entrollm.format.group_scales import GroupedKind
from entrollm.format.spec import TensorSpec
from tests.support.version1 import Version1Writer

ROWS, COLUMNS = 3, 10
CODE = Code(Field(1, (8,), Field(4, tuple(range(16)))))
SYMBOLS = (np.arange(ROWS * COLUMNS) ** 2 % 13).astype(np.uint8).reshape(ROWS, COLUMNS)

_F16, _BF16, _F32 = np.float16, ml_dtypes.bfloat16, np.float32
# By name: the form without its types, the zero, the arrays.
CASES: dict[str, tuple[dict[str, Any], int | None, dict[str, NDArray[Any]]]] = {
    "integer.zeros": (
        {"size": 4, "arithmetic": "F16"},
        None,
        {
            "group_scale": np.array([[0.1, 0.2, 0.3], [1, 2, 3], [-1, 0.01, 7]], _F16),
            "group_zero": np.array([[0, 1, 2], [3, 4, 5], [200, 255, 8]], np.uint8),
            "column_order": np.array([9, 0, 8, 1, 7, 2, 6, 3, 5, 4], np.uint32),
        },
    ),
    "float.zeros": (
        {"size": 5, "arithmetic": "BF16"},
        None,
        {
            "group_scale": np.array([[0.1, 0.2], [1, 2], [-1, 0.01]], _BF16),
            "group_zero": np.array([[0.3, 7.7], [-1, 2.25], [3, 100]], _BF16),
        },
    ),
    "nested": (
        {"size": 2, "super_size": 8},
        None,
        {
            "group_scale": np.array([[63, 1, 0, 17, 5], [1, 2, 3, 4, 5], [9, 8, 7, 6, 5]], np.uint8),
            "group_minimum": np.array([[0, 1, 2, 3, 63], [5, 4, 3, 2, 1], [1, 1, 1, 1, 1]], np.uint8),
            "super_scale": np.array([[0.1, 0.2], [1, 2], [3, 4]], _F16),
            "super_minimum": np.array([[0.7, 0.3], [1, 2], [-3, 0]], _F16),
        },
    ),
    "row": (
        {"size": 10, "factor": float(np.float32(1 / 127))},
        8,
        {"group_scale": np.array([[0.1], [3.3], [1e-3]], _F32)},
    ),
    "signed": (
        {"size": 2, "super_size": 16},
        8,
        {
            "group_scale": np.array([[-128, 127, 0, 17, 5], [1, 2, 3, 4, 5], [9, 8, 7, 6, 5]], np.int8),
            "super_scale": np.array([[0.1], [0.2], [0.3]], _F16),
        },
    ),
    "bytes": (
        {"size": 10, "values": "F8_E4M3", "arithmetic": "BF16"},
        None,
        {"group_scale": np.array([[0.5], [0.1], [2]], _BF16)},
    ),
}
_TYPES = {"uint8": "U8", "int8": "I8", "uint32": "U32", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def write_golden_groups(path: Path) -> None:
    """Write the folder."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "entrollm", "version": 1}}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with Version1Writer(path / "model.safetensors") as writer:
        for name, (form, zero, arrays) in CASES.items():
            dense, sparse, sizes = _core.encode(CODE.program(), 0, SYMBOLS, ROWS, 64)
            kind = GroupedKind(
                zero=zero, types={kind: _TYPES[str(array.dtype)] for kind, array in arrays.items()}, **form
            )
            spec = TensorSpec(ROWS, COLUMNS, "F32", "golden", CODE, Blocks(ROWS, 64), kind)
            stored: dict[str, NDArray[Any]] = {
                layout.DENSE: layout.padded_stream([dense]),
                layout.SPARSE: layout.padded_stream([sparse]),
                layout.SPARSE_SIZES: sizes,
            }
            stored |= {f".{kind}": layout.deflate_array(array) for kind, array in arrays.items()}
            writer.add_matrix(name + ".weight", spec, stored)


def expected_weight(name: str, row: int, column: int) -> float:
    """One weight of a case by the formula of docs/reference/format.md, a number at a time."""
    form, zero, arrays = CASES[name]
    rounded = {"F16": _F16, "BF16": _BF16}.get(form.get("arithmetic", "F32"), _F32)
    order = arrays.get("column_order", np.arange(COLUMNS)).tolist()
    stored_column = order.index(column)
    group = stored_column // form["size"]

    def nested(part: str) -> np.float32:
        value = _F32(arrays["group_" + part][row, group])
        if "super_" + part in arrays:
            return _F32(arrays["super_" + part][row, group * form["size"] // form["super_size"]]) * value
        return value

    symbol = SYMBOLS[row, stored_column]
    weight = _F32(symbol)
    if "values" in form:
        weight = _F32(symbol.view(ml_dtypes.float8_e4m3fn))
    if zero is not None:
        weight = _F32(rounded(weight - _F32(zero)))
    if "group_zero" in arrays:
        weight = _F32(rounded(weight - _F32(arrays["group_zero"][row, group])))
    weight = _F32(rounded(weight * nested("scale")))
    if "group_minimum" in arrays:
        weight = _F32(rounded(weight - nested("minimum")))
    if "factor" in form:
        weight = _F32(rounded(weight * _F32(form["factor"])))
    return float(weight)
