"""fp8 checkpoints keep their bytes, unless another size is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from entrollm import CompressOptions, _core, compress, load
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.verify import verify
from entrollm.errors import FormatError
from entrollm.format.grid import GridKind
from entrollm.format.reader import CompressedModel
from tests.support.quantized_sources import (
    TOLERANCE,
    Arrays,
    Packer,
    as_float32,
    imported_weights,
    write_dense,
    write_source,
)

BLOCKS = {"quant_method": "fp8", "weight_block_size": [64, 32]}
WEIGHTS = {"type": "float", "num_bits": 8}
CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}


def packer(kind: str, dtype: Any = ml_dtypes.float8_e4m3fn) -> Packer:
    """Rounds random weights to fp8 over scales of blocks, rows or the matrix."""

    def pack(generator: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, NDArray[np.float32]]:
        octets = (generator.standard_normal((rows, columns)) * 40).astype(dtype)
        if kind == "blocks":
            shape: tuple[int, ...] = (rows // 64, columns // 32)
        else:
            shape = (rows, 1) if kind == "rows" else (1,)
        scale = generator.uniform(0.5, 1.5, shape) / (40 * columns**0.5)
        stored = scale.astype(np.float32 if kind == "blocks" else ml_dtypes.bfloat16)
        wide = as_float32(stored)
        if kind == "blocks":
            wide = np.repeat(np.repeat(wide, 64, axis=0), 32, axis=1)
        name = "weight_scale_inv" if kind == "blocks" else "weight_scale"
        return {"weight": octets, name: stored}, octets.astype(np.float32) * wide

    return pack


@pytest.mark.parametrize(
    ("config", "pack"),
    [
        (BLOCKS, packer("blocks")),
        (BLOCKS, packer("blocks", ml_dtypes.float8_e5m2)),
        (CHANNELS, packer("rows")),
        (CHANNELS, packer("tensor")),
    ],
)
def test_weights_are_exactly_the_sources(config: dict[str, Any], pack: Packer, tmp_path: Path) -> None:
    expected = write_source(tmp_path / "source", config, pack)
    result = compress(tmp_path / "source", tmp_path / "out")
    found = imported_weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        np.testing.assert_array_equal(found[name], weights)
    assert result.imported is not None and (result.imported.format, result.imported.source_bits > 8) == ("fp8", True)
    with CompressedModel.open(tmp_path / "out") as model, Checkpoint.open(tmp_path / "source") as source:
        assert verify(model, _core.ThreadPool(2), source).compared

    ids = [5, 300, 17, 17, 9, 211]
    wanted = load(write_dense(tmp_path / "dense", expected)).logits(ids)
    np.testing.assert_allclose(load(tmp_path / "out").logits(ids), wanted, atol=TOLERANCE * float(np.abs(wanted).max()))


def test_a_size_quantizes_them_like_other_floats(tmp_path: Path) -> None:
    write_source(tmp_path / "source", BLOCKS, packer("blocks"))
    result = compress(tmp_path / "source", tmp_path / "out", CompressOptions(bits=4))
    assert result.imported is None
    with CompressedModel.open(tmp_path / "out") as model:
        assert all(isinstance(spec.kind, GridKind) for spec in model.specs.values()) and len(model.specs) == 9


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def pack(generator: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, NDArray[np.float32]]:
        parts, weights = packer("blocks")(generator, rows, columns)
        parts["weight"][3, 5] = np.nan
        return parts, weights

    write_source(tmp_path / "source", BLOCKS, pack)
    with pytest.raises(FormatError, match="has a weight or a scale that is not finite"):
        compress(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("block", [[2**31, 2**31], [64, 2**70], [10**30, 32]])
def test_blocks_far_larger_than_the_matrix(tmp_path: Path, block: list[int]) -> None:
    """They are cut off at its ends, and take no memory beyond."""

    def pack(generator: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, NDArray[np.float32]]:
        octets = (generator.standard_normal((rows, columns)) * 40).astype(ml_dtypes.float8_e4m3fn)
        shape = (-(-rows // block[0]), -(-columns // block[1]))
        scale = generator.uniform(0.5, 1.5, shape).astype(np.float32)
        wide = np.repeat(scale, min(block[0], rows), axis=0)[:rows]
        wide = np.repeat(wide, min(block[1], columns), axis=1)[:, :columns]
        return {"weight": octets, "weight_scale_inv": scale}, octets.astype(np.float32) * wide

    expected = write_source(tmp_path / "source", {"quant_method": "fp8", "weight_block_size": block}, pack)
    with Checkpoint.open(tmp_path / "source") as checkpoint:
        for name, weights in expected.items():
            np.testing.assert_array_equal(checkpoint.read_float32(name), weights)
            found = checkpoint.read_imported(name)
            np.testing.assert_array_equal(found.groups.apply(found.symbols.astype(np.float32), slice(0, None)), weights)
