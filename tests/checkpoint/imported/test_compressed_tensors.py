"""compressed-tensors checkpoints keep their integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from entrollm import compress, load
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import FormatError, UnsupportedError
from entrollm.format.reader import CompressedModel
from tests.support.quantized_sources import (
    TOLERANCE,
    Arrays,
    Packer,
    as_float32,
    change_tensors,
    imported_weights,
    pack_fields,
    random_scales,
    write_dense,
    write_source,
)

LAYER = "model.layers.0.mlp.down_proj."


def config(kind: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, **more}


def packer(
    kind: str, bits: int, groups: int | None, *, zeros: bool = False, order: bool = False, dtype: Any = np.float16
) -> Packer:
    """Packs random integers; groups is how many a row has, None for one scale of the whole matrix."""

    def pack(generator: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, NDArray[np.float32]]:
        half = 2 ** (bits - 1)
        shape = (1, 1) if groups is None else (rows, groups)
        integers = generator.integers(-half, half, (rows, columns))
        zero = generator.integers(-half, half, shape) if zeros else np.zeros(shape, np.int64)
        scale = random_scales(generator, shape, bits, columns).astype(dtype)
        group = np.arange(columns) * shape[1] // columns
        if order:
            group = generator.permutation(group)
        parts: Arrays = {"weight_scale": scale if groups is not None else scale.reshape(1)}
        if kind == "pack-quantized":
            parts["weight_packed"] = pack_fields(integers + half, bits)
            parts["weight_shape"] = np.array([rows, columns], np.int64)
            if zeros:
                parts["weight_zero_point"] = pack_fields((zero + half).T, bits).T
        else:
            parts["weight"] = integers.astype(np.int8)
            parts["input_scale"] = np.ones(1, np.float32)
            if zeros:
                parts["weight_zero_point"] = zero.astype(np.int8)
        if order:
            parts["weight_g_idx"] = group.astype(np.int32)
        weights = (integers - zero[:, group]).astype(dtype) * scale[:, group]
        assert weights.dtype == dtype
        return parts, as_float32(weights)

    return pack


CASES: dict[str, tuple[str, Packer]] = {
    "groups": ("pack-quantized", packer("pack-quantized", 4, 4, dtype=ml_dtypes.bfloat16)),
    "groups, zeros": ("pack-quantized", packer("pack-quantized", 4, 2, zeros=True)),
    "groups, zeros, order": ("pack-quantized", packer("pack-quantized", 3, 4, zeros=True, order=True)),
    "rows, 2 bits": ("pack-quantized", packer("pack-quantized", 2, 1)),
    "rows, packed 8 bits": ("pack-quantized", packer("pack-quantized", 8, 1, zeros=True)),
    "rows": ("int-quantized", packer("int-quantized", 8, 1, dtype=ml_dtypes.bfloat16)),
    "rows, zeros": ("int-quantized", packer("int-quantized", 8, 1, zeros=True, dtype=np.float32)),
    "tensor": ("naive-quantized", packer("naive-quantized", 8, None, zeros=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_exactly_the_sources(case: str, tmp_path: Path) -> None:
    kind, pack = CASES[case]
    expected = write_source(tmp_path / "source", config(kind), pack)
    compress(tmp_path / "source", tmp_path / "out")
    found = imported_weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        np.testing.assert_array_equal(found[name], weights)
    with CompressedModel.open(tmp_path / "out") as model:
        assert not any(name.endswith(("_scale", "_zero_point", "_shape", "_g_idx")) for name in model.plain)


def test_the_engine_runs_imported_models(tmp_path: Path) -> None:
    expected = write_source(tmp_path / "source", *_case("groups, zeros, order"))
    compress(tmp_path / "source", tmp_path / "out")
    ids = [5, 300, 17, 17, 9, 211]
    wanted = load(write_dense(tmp_path / "dense", expected)).logits(ids)
    found = load(tmp_path / "out").logits(ids)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE * float(np.abs(wanted).max()))


def _case(case: str) -> tuple[dict[str, Any], Packer]:
    kind, pack = CASES[case]
    return config(kind), pack


def test_an_index_of_columns_in_order_may_be_all_minus_one(tmp_path: Path) -> None:
    expected = write_source(tmp_path / "source", *_case("groups"))
    change_tensors(tmp_path / "source", lambda t: t.update({LAYER + "weight_g_idx": np.full(256, -1, np.int32)}))
    with Checkpoint.open(tmp_path / "source") as source:
        np.testing.assert_array_equal(source.read_float32(LAYER + "weight"), expected[LAYER + "weight"])


@pytest.mark.parametrize(
    ("case", "part", "value", "message"),
    [
        ("groups", "weight_shape", None, "expected two integers, found None"),
        ("groups", "weight_shape", np.array([127, 256], np.int64), r"cannot hold the shape \[127, 256\]"),
        ("groups", "weight_shape", np.array([128, 2**40], np.int64), "cannot hold the shape"),
        ("groups", "weight_shape", np.array([128, -1], np.int64), "cannot hold the shape"),
        ("groups", "weight_shape", np.array([128, 260], np.int64), "32 words do not hold 260 weights of equal bits"),
        ("groups", "weight_packed", np.zeros((128, 32), np.uint8), "expected a matrix of type I32, found U8"),
        ("groups", "weight_scale", np.ones((128, 3), np.float16), "one for each row and group"),
        ("groups", "weight_scale", None, "one for each row and group, found None"),
        ("groups", "weight_scale", np.full((128, 4), np.nan, np.float16), "a value that is not finite"),
        ("groups", "weight_g_idx", np.full(256, 4, np.int32), "group 4 is out of range, there are 4"),
        ("groups", "weight_g_idx", np.zeros(255, np.int32), "expected 256 integers"),
        ("groups, zeros", "weight_zero_point", np.zeros((3, 2), np.int32), "expected 128 x 2 zeros"),
        ("groups, zeros", "weight_zero_point", np.full((128, 2), -9, np.int8), "a zero is out of range"),
        ("rows", "weight", np.zeros((128, 0), np.int8), r"found I8 \[128, 0\]"),
    ],
)
def test_malformed_layers_are_refused(case: str, part: str, value: Any, message: str, tmp_path: Path) -> None:
    write_source(tmp_path / "source", *_case(case))
    change_tensors(
        tmp_path / "source", lambda t: t.pop(LAYER + part) if value is None else t.update({LAYER + part: value})
    )
    with pytest.raises(FormatError, match=message):
        compress(tmp_path / "source", tmp_path / "out")


def test_sparse_checkpoints_are_refused(tmp_path: Path) -> None:
    sparse = config("pack-quantized", sparsity_config={"format": "sparse-24-bitmask"})
    write_source(tmp_path / "source", sparse, CASES["groups"][1])
    with pytest.raises(UnsupportedError, match="with a sparsity_config; only dense weights are supported"):
        Checkpoint.open(tmp_path / "source")


def test_rotated_checkpoints_are_refused(tmp_path: Path) -> None:
    rotated = config("pack-quantized", transform_config={"config_groups": {"R1": {"type": "hadamard"}}})
    write_source(tmp_path / "source", rotated, CASES["groups"][1])
    with pytest.raises(
        UnsupportedError, match=r"source.config\.json: .*with a transform_config.*use the original checkpoint"
    ):
        Checkpoint.open(tmp_path / "source")
    write_source(tmp_path / "plain", config("pack-quantized", transform_config={}), CASES["groups"][1])
    Checkpoint.open(tmp_path / "plain").close()
