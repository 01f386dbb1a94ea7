"""GPTQ checkpoints keep their integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from entrollm import CompressOptions, _core, compress, load
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.cli.console import describe_error
from entrollm.compress.export import export
from entrollm.compress.verify import verify
from entrollm.errors import FormatError, UnsupportedError
from entrollm.format.reader import CompressedModel
from tests.support.quantized_sources import (
    LINEARS,
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

LAYER = "model.layers.0.mlp.up_proj."


def packer(bits: int, group_size: int, *, layout: str = "gptq", act_order: bool = False, index: bool = True) -> Packer:
    """Packs random integers as AutoGPTQ does."""

    def pack(generator: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, NDArray[np.float32]]:
        size = columns if group_size == -1 else group_size
        groups = columns // size
        group = np.arange(columns) // size
        if act_order:
            group = generator.permutation(group)
        integers = generator.integers(0, 2**bits, (columns, rows))
        zeros = generator.integers(1, 2**bits, (groups, rows))
        scales = random_scales(generator, (groups, rows), bits, columns)
        stored_zeros = zeros - 1 if layout == "gptq" else zeros
        parts: Arrays = {
            "qweight": pack_fields(integers.T, bits).T,
            "qzeros": pack_fields(stored_zeros, bits),
            "scales": scales,
        }
        if index:
            parts["g_idx"] = group.astype(np.int32)
        # In half precision, as the torch kernel of gptqmodel computes it.
        weights = scales[group] * (integers - zeros[group]).astype(np.float16)
        return parts, as_float32(weights.T)

    return pack


def config(bits: int, group_size: int, layout: str = "gptq", **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "checkpoint_format": layout, **more}


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (3, 32), (4, 128), (8, -1)])
def test_weights_are_exactly_the_sources(bits: int, group_size: int, layout: str, tmp_path: Path) -> None:
    expected = write_source(
        tmp_path / "source", config(bits, group_size, layout), packer(bits, group_size, layout=layout)
    )
    result = compress(tmp_path / "source", tmp_path / "out")
    found = imported_weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        np.testing.assert_array_equal(found[name], weights)
    assert result.imported is not None and result.imported.weights == sum(r * c for r, c in LINEARS.values())
    assert abs(result.imported.entropy_bits - bits) < 0.1


@pytest.mark.parametrize("index", [False, True])
def test_groups_may_be_implied_or_out_of_order(index: bool, tmp_path: Path) -> None:
    pack = packer(4, 32, act_order=index, index=index)
    expected = write_source(tmp_path / "source", config(4, 32), pack)
    compress(tmp_path / "source", tmp_path / "out")
    for name, weights in imported_weights(tmp_path / "out").items():
        np.testing.assert_array_equal(weights, expected[name])


def test_the_keys_of_newer_configs_are_known(tmp_path: Path) -> None:
    pack = packer(4, 32, layout="gptq_v2")
    expected = write_source(tmp_path / "source", {"method": "gptq", "bits": 4, "format": "gptq_v2"}, pack)
    with Checkpoint.open(tmp_path / "source") as source:
        np.testing.assert_array_equal(source.read_float32(LAYER + "weight"), expected[LAYER + "weight"])


def test_the_engine_runs_imported_models(tmp_path: Path) -> None:
    expected = write_source(tmp_path / "source", config(4, 32), packer(4, 32, act_order=True))
    compress(tmp_path / "source", tmp_path / "out")
    ids = [5, 300, 17, 17, 9, 211]
    wanted = load(write_dense(tmp_path / "dense", expected)).logits(ids)
    for folder in ("source", "out"):
        found = load(tmp_path / folder).logits(ids)
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE * float(np.abs(wanted).max()))


def test_verify_and_export_agree_with_the_source(tmp_path: Path) -> None:
    expected = write_source(tmp_path / "source", config(4, 64), packer(4, 64))
    compress(tmp_path / "source", tmp_path / "out")
    with CompressedModel.open(tmp_path / "out") as model, Checkpoint.open(tmp_path / "source") as source:
        assert verify(model, _core.ThreadPool(2), source).compared
        export(model, tmp_path / "exported", _core.ThreadPool(1))
    with Checkpoint.open(tmp_path / "exported") as exported:
        for name, weights in expected.items():
            assert exported.tensors[name].dtype == "F16"
            np.testing.assert_array_equal(exported.read(name).astype(np.float32), weights)


def test_verify_finds_another_sources_scales(tmp_path: Path) -> None:
    write_source(tmp_path / "source", config(4, 64), packer(4, 64))
    compress(tmp_path / "source", tmp_path / "out")

    def change(tensors: Arrays) -> None:
        scales = tensors[LAYER + "scales"].copy()
        scales[1, 3] = np.nextafter(scales[1, 3], np.float16(1))
        tensors[LAYER + "scales"] = scales

    change_tensors(tmp_path / "source", change)
    with (
        CompressedModel.open(tmp_path / "out") as model,
        Checkpoint.open(tmp_path / "source") as source,
        pytest.raises(FormatError, match="its weights are not exactly those of the original"),
    ):
        verify(model, _core.ThreadPool(2), source)


def test_zeros_of_the_first_layout_carry_as_gptqmodel_adds_them(tmp_path: Path) -> None:
    write_source(tmp_path / "source", config(4, 128), packer(4, 128))
    change_tensors(tmp_path / "source", lambda t: t.update({LAYER + "qzeros": np.full((1, 32), 0x3F, np.int32)}))
    with Checkpoint.open(tmp_path / "source") as source:
        zeros = source.read_imported(LAYER + "weight").groups.arrays["group_zero"]
    # 0x0000003F + 0x11111111 = 0x11111150
    assert zeros[:8, 0].tolist() == [0, 5, 1, 1, 1, 1, 1, 1]


def test_other_tensors_are_kept_unless_they_are_named(tmp_path: Path) -> None:
    write_source(tmp_path / "source", config(4, 128), packer(4, 128))
    options = CompressOptions(overrides={"lm_head*": 8})
    compress(tmp_path / "source", tmp_path / "out", options)
    with CompressedModel.open(tmp_path / "out") as model:
        assert "lm_head.weight" in model.specs and "model.embed_tokens.weight" in model.plain
        source = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (source["method"], source["source"]) == ("imported", "GPTQ")


def test_quantizing_twice_is_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "source", config(4, 128), packer(4, 128))
    with pytest.raises(ValueError, match=r"is quantized already \(GPTQ\), and its integers are kept: leave") as raised:
        compress(tmp_path / "source", tmp_path / "out", CompressOptions(bits=4))
    assert "leave out bits, bpw and size, or compress" in str(raised.value)
    assert "overrides={GLOB: N} quantizes the tensors that it left alone" in str(raised.value)
    shown = describe_error(raised.value)
    assert "leave out --bits, --bpw and --fit, or compress" in shown
    assert "--bits GLOB=N quantizes the tensors that it left alone" in shown


def test_a_pattern_for_packed_matrices_is_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "source", config(4, 128), packer(4, 128))
    options = CompressOptions(overrides={"*_proj*": 8})
    with pytest.raises(ValueError, match=r"the pattern '\*_proj\*' matches none of the 5 other tensors"):
        compress(tmp_path / "source", tmp_path / "out", options)


def int32(*shape: int) -> NDArray[np.int32]:
    return np.zeros(shape, np.int32)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("qweight", int32(15, 256), "15 words do not hold 128 weights of 4 bits"),
        ("qweight", np.zeros((16, 256), np.float32), "expected a matrix of type I32, found F32"),
        ("qzeros", int32(2, 31), "31 words do not hold 256 zeros of 4 bits"),
        ("qzeros", None, "the tensor is missing, though others of its layer"),
        ("qzeros", int32(200, 32), "200 groups of 128 columns"),
        ("scales", np.ones((2, 255), np.float16), r"expected shape \[2, 256\]"),
        ("scales", np.full((2, 256), np.inf, np.float16), "a value that is not finite"),
        ("g_idx", int32(0), "expected one axis of I32"),
        ("g_idx", np.full(128, 2, np.int32), "group 2 is out of range, there are 2"),
        ("g_idx", np.full(128, -1, np.int32), "is out of range, there are 2"),
    ],
)
def test_malformed_layers_are_refused(part: str, value: Any, message: str, tmp_path: Path) -> None:
    write_source(tmp_path / "source", config(4, 64), packer(4, 64))
    change_tensors(
        tmp_path / "source", lambda t: t.pop(LAYER + part) if value is None else t.update({LAYER + part: value})
    )
    with pytest.raises(FormatError, match=message):
        compress(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"checkpoint_format": "marlin"}, UnsupportedError, "quantized weights in the layout 'marlin'"),
        ({"checkpoint_format": 3}, UnsupportedError, "quantized weights in the layout 3"),
        ({"is_marlin_format": True}, UnsupportedError, "GPTQ weights in Marlin's layout"),
        ({"bits": 5}, UnsupportedError, "bits 5; supported are"),
        ({"bits": "4"}, FormatError, "bits '4', expected an integer"),
    ],
)
def test_other_variants_are_refused(changes: dict[str, Any], error: type, message: str, tmp_path: Path) -> None:
    write_source(tmp_path / "source", config(4, 64) | changes, packer(4, 64))
    with pytest.raises(error, match=message):
        Checkpoint.open(tmp_path / "source")


def test_uneven_groups_are_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "source", config(4, 64), packer(4, 64))
    group = np.repeat(np.array([0, 1], np.int32), [40, 88])
    change_tensors(tmp_path / "source", lambda t: t.update({LAYER + "g_idx": group}))
    with pytest.raises(UnsupportedError, match="its groups have 40 to 88 columns, expected one size"):
        compress(tmp_path / "source", tmp_path / "out")


def test_a_config_without_its_weights_is_refused(tmp_path: Path) -> None:
    write_source(
        tmp_path / "source", config(4, 64), lambda generator, rows, columns: ({}, np.zeros((1, 1), np.float32))
    )
    with pytest.raises(FormatError, match=r"config\.json declares GPTQ weights, but there are none"):
        Checkpoint.open(tmp_path / "source")


def test_a_weight_that_is_stored_twice_is_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "source", config(4, 64), packer(4, 64))
    change_tensors(tmp_path / "source", lambda t: t.update({LAYER + "weight": np.ones((2, 2), np.float32)}))
    with pytest.raises(FormatError, match="is stored twice, quantized and plain"):
        Checkpoint.open(tmp_path / "source")
