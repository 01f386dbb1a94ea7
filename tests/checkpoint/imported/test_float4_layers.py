"""NVFP4 and MXFP4 layers of compressed-tensors, AutoRound, ModelOpt and Quark keep their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from entrollm import compress, load
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import FormatError, UnsupportedError
from tests.support.float4_sources import mxfp4_packer, nvfp4_packer
from tests.support.quantized_sources import (
    TOLERANCE,
    Arrays,
    Packer,
    imported_weights,
    write_dense,
    write_source,
)

LAYER = "model.layers.0.mlp.up_proj."


def compressed_tensors(name: str) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": name, "config_groups": groups, "ignore": ["lm_head"]}


def quark(**weight: Any) -> dict[str, Any]:
    return {"quant_method": "quark", "global_quant_config": {"weight": weight}, "layer_quant_config": {}}


NVFP4 = compressed_tensors("nvfp4-pack-quantized")
MXFP4 = quark(dtype="fp4", scale_format="e8m0", group_size=32)
CASES: dict[str, tuple[dict[str, Any], Packer]] = {
    "compressed-tensors nvfp4": (NVFP4, nvfp4_packer("weight_packed", divides=True)),
    "compressed-tensors mxfp4": (compressed_tensors("mxfp4-pack-quantized"), mxfp4_packer("weight_packed")),
    "AutoRound nvfp4": (
        {"quant_method": "auto-round", "bits": 4, "data_type": "nv_fp4_with_static_gs", "group_size": 16},
        nvfp4_packer("weight_packed", divides=True),
    ),
    "ModelOpt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4_packer("weight", divides=False)),
    "Quark mxfp4": ({**MXFP4, "algo_config": [{"name": "smooth"}]}, mxfp4_packer("weight")),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_exactly_the_sources(case: str, tmp_path: Path) -> None:
    expected = write_source(tmp_path / "source", *CASES[case])
    compress(tmp_path / "source", tmp_path / "out")
    found = imported_weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        np.testing.assert_array_equal(found[name], weights)
    ids = [5, 300, 17, 17, 9, 211]
    wanted = load(write_dense(tmp_path / "dense", expected)).logits(ids)
    np.testing.assert_allclose(load(tmp_path / "out").logits(ids), wanted, atol=TOLERANCE * float(np.abs(wanted).max()))


@pytest.mark.parametrize("method", ["modelopt", "quark"])
def test_fp8_of_other_tools_is_read(method: str, tmp_path: Path) -> None:
    def pack(generator: np.random.Generator, rows: int, columns: int) -> Any:
        values = generator.standard_normal((rows, columns)).astype(ml_dtypes.float8_e4m3fn)
        parts = {"weight": values, "weight_scale": np.float32(0.125), "input_scale": np.float32(1)}
        return {name: np.asarray(array) for name, array in parts.items()}, values.astype(np.float32) * np.float32(0.125)

    description = {"quant_method": method, "quant_algo": "FP8"} if method == "modelopt" else quark(dtype="fp8_e4m3")
    expected = write_source(tmp_path, description, pack)
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, weights in expected.items():
            np.testing.assert_array_equal(checkpoint.read_float32(name), weights)


def with_zeros(tensors: Arrays) -> None:
    tensors["weight_zero_point"] = np.zeros(1, np.int8)


def with_order(tensors: Arrays) -> None:
    tensors["weight_g_idx"] = np.zeros(128, np.int32)


def without_whole(tensors: Arrays) -> None:
    del tensors["weight_global_scale"]


def with_two(tensors: Arrays) -> None:
    tensors["weight_global_scale"] = np.ones(2, np.float32)


def with_zero(tensors: Arrays) -> None:
    tensors["weight_global_scale"] = np.zeros(1, np.float32)


def with_infinity(tensors: Arrays) -> None:
    tensors["weight_global_scale"] = np.full(1, np.inf, np.float32)


def with_nan(tensors: Arrays) -> None:
    tensors["weight_scale"] = np.full((256, 8), np.nan, ml_dtypes.float8_e4m3fn)


def with_few_groups(tensors: Arrays) -> None:
    tensors["weight_scale"] = np.ones((256, 4), ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (with_zeros, UnsupportedError, "weight_zero_point: 4-bit floats with a weight_zero_point are not supported"),
        (with_order, UnsupportedError, "weight_g_idx: 4-bit floats with a weight_g_idx are not supported"),
        (without_whole, FormatError, "it needs either weight_global_scale or weight_scale_2, found none"),
        (with_two, FormatError, "weight_global_scale: expected one number of type F32"),
        (with_zero, FormatError, "a scale is not finite, or too large for float32"),
        (with_infinity, FormatError, "weight_global_scale: it is inf, which makes scales zero; the file is damaged"),
        (with_nan, FormatError, "a scale is not finite, or too large for float32"),
        (with_few_groups, FormatError, r"for each of 256 rows and each 16 of 128 columns, found \[256, 4\]"),
    ],
)
def test_malformed_layers_are_refused(
    change: Callable[[Arrays], None], error: type[Exception], message: str, tmp_path: Path
) -> None:
    description, pack = CASES["compressed-tensors nvfp4"]

    def changed(generator: np.random.Generator, rows: int, columns: int) -> Any:
        parts, weights = pack(generator, rows, columns)
        if rows == 256:
            change(parts)
        return parts, weights

    write_source(tmp_path, description, changed)
    with pytest.raises(error, match=message), Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.read_float32(LAYER + "weight")


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "'modelopt' with quant_algo 'W4A8_AWQ'"),
        (quark(dtype="int4"), r"'quark' \(int4\)"),
        ({**quark(dtype="fp4"), "layer_quant_config": {"a": {}}}, "types that differ between layers"),
        (
            {**quark(dtype="fp8_e4m3"), "layer_type_quant_config": {"torch.nn.Linear": {}}},
            "types that differ between layers",
        ),
        ({**NVFP4, "transform_config": {"a": 1}}, "with a transform_config, which rotates the weights"),
        ({**MXFP4, "algo_config": [{"name": "smooth"}, {"name": "rotation"}]}, "with an algo_config, which rotates"),
        ({**MXFP4, "algo_config": {"name": "quarot", "online_had": True}}, "with an algo_config, which rotates"),
        ({**quark(dtype="fp8_e4m3"), "algo_config": ["QuaRot"]}, "with an algo_config, which rotates"),
        ({**quark(dtype="fp8_e4m3"), "algo_config": {"a": {"name": "rotation"}}}, "with an algo_config, which rotates"),
    ],
)
def test_other_descriptions_are_refused_by_name(description: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_source(tmp_path, description, nvfp4_packer("weight_packed", divides=True))
    with pytest.raises(UnsupportedError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["weight_global_scale", "weight_scale_2"])
def test_exponents_with_a_number_of_the_whole_matrix_are_refused(name: str, tmp_path: Path) -> None:
    def pack(generator: np.random.Generator, rows: int, columns: int) -> Any:
        parts, weights = mxfp4_packer("weight_packed")(generator, rows, columns)
        return {**parts, name: np.ones(1, np.float32)}, weights

    write_source(tmp_path, compressed_tensors("mxfp4-pack-quantized"), pack)
    with pytest.raises(UnsupportedError, match=rf"{name}: expected no such tensor beside exponents .*is U8\)"):
        Checkpoint.open(tmp_path)
