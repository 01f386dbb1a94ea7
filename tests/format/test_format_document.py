"""The example in docs/reference/format.md is what the code writes."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import numpy as np

from entrollm import _core
from entrollm.codec import reference
from entrollm.format import layout
from entrollm.format.blocks import Blocks
from entrollm.format.code import Code, Field
from entrollm.format.grid import GridKind
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import TensorSpec
from entrollm.format.stored import store_matrix
from entrollm.format.writer import ShardWriter
from entrollm.matrix import matrix_of
from tests.support.folders import check_all, read_safetensors, write_config
from tests.support.paths import ROOT

DOCUMENT = (ROOT / "docs" / "reference" / "format.md").read_text(encoding="utf-8")
ROW = [13, 12, 9, 14, 16, 12, 201, 15, 5, 12]
CODE = Code(Field(1, (12,), Field(2, (8, 16, 4), Field(8, ()))), low_bits=2)


def test_the_streams_are_as_shown() -> None:
    dense, sparse, sizes = reference.encode_matrix(CODE, [ROW], Blocks(1, 64))
    assert len(dense) == 72 and sizes == [5]
    assert not any(dense[20:])
    for shown in (dense[:8], sparse, CODE.program()):
        assert f"\n    {shown.hex(' ')}\n" in DOCUMENT
    assert f"\n    {dense[8:20].hex(' ')} ... 00\n" in DOCUMENT
    assert f"with symbols {' '.join(map(str, ROW))}, `low_bits` 2" in DOCUMENT


def test_the_file_is_as_shown(tmp_path: Path) -> None:
    dense, sparse, sizes = _core.encode(CODE.program(), CODE.low_bits, np.array([ROW], np.uint8), 1, 64)
    spec = TensorSpec(1, 10, "BF16", "paper-asymmetric-8-tensor", CODE, Blocks(1, 64), GridKind(0.25, -3.0), 0.0125)
    write_config(tmp_path)
    with ShardWriter(tmp_path / "model.safetensors") as writer:
        arrays = {layout.DENSE: layout.padded_stream([dense]), layout.SPARSE: layout.padded_stream([sparse])}
        writer.add_matrix(store_matrix("w.weight", spec, arrays | {layout.SPARSE_SIZES: sizes}))
    header, _ = read_safetensors(tmp_path / "model.safetensors")
    table = json.loads(zlib.decompress(base64.b64decode(header["__metadata__"]["entrollm.tensors"])))
    assert f"\n    {table['coded']['w.weight']}\n" in DOCUMENT and table["plain"] == {}
    assert header["w.weight.coded"]["shape"] == [320]
    check_all(tmp_path)
    with CompressedModel.open(tmp_path) as model:
        values = matrix_of(model, "w.weight").dequantize(np.array([0]), _core.ThreadPool(1))
    assert values[0, 0] == 0.25
