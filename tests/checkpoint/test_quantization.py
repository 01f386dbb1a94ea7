"""Checkpoints that are quantized and do not say so where it is looked for first, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from entrollm import CompressOptions, compress
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.quantization import find_description
from entrollm.errors import FormatError, UnsupportedError
from tests.checkpoint.imported.test_gptq import packer
from tests.support.quantized_sources import (
    CONFIG,
    LINEARS,
    Packer,
    imported_weights,
    plain_tensors,
    write_folder,
    write_source,
)

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
WORDS = {"a.weight": np.ones((2, 3), np.float32)}


def describe(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {**config, **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    "place",
    [
        {"quantization_config": GPTQ},
        {"compression_config": GPTQ},
        {"text_config": {"quantization_config": GPTQ, "hidden_size": 128}},
        {"text_config": {"compression_config": GPTQ}},
        {"llm_config": {"quantization_config": GPTQ}},
        {"quantization_config": GPTQ, "text_config": {"quantization_config": GPTQ}},
    ],
)
def test_a_description_is_found_wherever_it_is(place: dict[str, Any], tmp_path: Path) -> None:
    expected = write_source(tmp_path / "source", GPTQ, packer(4, 32))
    describe(tmp_path / "source", quantization_config=None)
    describe(tmp_path / "source", **place)
    compress(tmp_path / "source", tmp_path / "out")
    found = imported_weights(tmp_path / "out")
    for name, weights in expected.items():
        np.testing.assert_array_equal(found[name], weights)
    config = (tmp_path / "out" / "config.json").read_text()
    assert config.count("quant_method") == 1
    assert "gptq" not in config


def test_two_descriptions_that_differ_are_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "source", GPTQ, packer(4, 32))
    describe(tmp_path / "source", text_config={"quantization_config": {**GPTQ, "bits": 8}})
    with pytest.raises(FormatError, match=r"quantization_config and text_config\.quantization_config describe"):
        Checkpoint.open(tmp_path / "source")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_nested_description_is_checked(key: str, tmp_path: Path) -> None:
    write_folder(tmp_path, WORDS, {**CONFIG, "text_config": {key: {"quant_method": "aqlm"}}})
    with pytest.raises(UnsupportedError, match="the weights are quantized by 'aqlm', which is not supported"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("description", "name"),
    [
        ({"bits": 4, "group_size": 64}, r"MLX \(4 bits\)"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "'marlin-24'"),
        ({"quant_method": "compressed-tensors", "format": "mixed-precision"}, "'mixed-precision'"),
        ({"quant_method": "modelopt"}, "'modelopt'"),
        ({"quant_method": "quanto"}, "'quanto'"),
        ({"quant_method": "torchao"}, "'torchao'"),
    ],
)
def test_refusals_name_what_was_found(description: dict[str, Any], name: str, tmp_path: Path) -> None:
    write_folder(tmp_path, WORDS, {**CONFIG, "quantization_config": description})
    with pytest.raises(UnsupportedError, match=f"quantized by .*{name}.*, which is not supported; use the original"):
        Checkpoint.open(tmp_path)


def test_rotated_fp8_is_refused(tmp_path: Path) -> None:
    description = {"quant_method": "compressed-tensors", "format": "float-quantized", "transform_config": {"a": 1}}
    write_folder(tmp_path, WORDS, {**CONFIG, "quantization_config": description})
    with pytest.raises(UnsupportedError, match=r"'compressed-tensors' with a transform_config, which rotates"):
        Checkpoint.open(tmp_path)


def test_mlx_is_known_by_its_own_key(tmp_path: Path) -> None:
    write_folder(tmp_path, WORDS, {**CONFIG, "quantization": {"bits": 4, "group_size": 64}})
    with pytest.raises(UnsupportedError, match=r"quantized by MLX \(4 bits\)"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("other", ["none", {"kind": "vq"}, 3])
def test_other_meanings_of_a_word_stay_in_the_config(other: Any, tmp_path: Path) -> None:
    write_folder(tmp_path, WORDS, {**CONFIG, "quantization": other, "audio_config": {"quantization": other}})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.config["quantization"] == checkpoint.config["audio_config"]["quantization"] == other


def _with(tensor: str, array: np.ndarray) -> dict[str, np.ndarray]:
    return {"model.embed_tokens.weight": np.ones((4, 8), np.float32), tensor: array}


PACKED = {
    "GPTQ": ("a.qweight", np.ones((4, 8), np.int32)),
    "GPTQ zeros": ("a.qzeros", np.ones((4, 8), np.int32)),
    "AWQ, 16 bits": ("a.qweight", np.ones((4, 8), np.int16)),
    "compressed-tensors": ("a.weight_packed", np.ones((4, 8), np.int32)),
    "int8": ("a.weight", np.ones((4, 8), np.int8)),
    "bitsandbytes": ("a.weight", np.ones((32, 1), np.uint8)),
    "one axis": ("a.weight", np.ones(32, np.uint8)),
    "MLX": ("a.weight", np.ones((4, 8), np.uint32)),
    "HQQ": ("a.W_q", np.ones((4, 8), np.uint8)),
    "MXFP4": ("mlp.experts.gate_up_proj_blocks", np.ones((2, 4, 4, 16), np.uint8)),
    "MXFP4 scales": ("mlp.experts.gate_up_proj_scales", np.ones((2, 4, 4), np.uint8)),
    "quanto": ("a.weight._data", np.ones((4, 8), np.int8)),
    "AQLM": ("a.codes", np.ones((4, 8, 1), np.int16)),
    "QuIP#": ("a.Qidxs", np.ones((4, 8), np.int16)),
    "VPTQ": ("a.indices", np.ones((4, 8), np.int64)),
}


@pytest.mark.parametrize("case", PACKED)
def test_integers_where_weights_belong_are_refused(case: str, tmp_path: Path) -> None:
    name, array = PACKED[case]
    write_folder(tmp_path / "source", _with(name, array), CONFIG)
    with pytest.raises(
        UnsupportedError, match=rf"tensor '{name}' holds integers \(.*where weights belong.*--keep '{name}'"
    ):
        compress(tmp_path / "source", tmp_path / "out")
    options = CompressOptions(overrides={name: None})
    assert compress(tmp_path / "source", tmp_path / "out", options).quantized_weights == 32


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("embeddings.position_ids", np.arange(512)[None]),
        ("swin.relative_position_index", np.ones((49, 49), np.int64)),
        ("norm.num_batches_tracked", np.array(3)),
        ("h.0.attn.bias", np.ones((1, 1, 8, 8), np.uint8)),
        ("h.0.attn.bias", np.ones((1, 1, 8, 8), np.bool_)),
        ("counter", np.ones(3, np.int32)),
    ],
)
def test_integers_that_models_have_are_kept(name: str, array: np.ndarray, tmp_path: Path) -> None:
    write_folder(tmp_path / "source", _with(name, array), CONFIG)
    assert compress(tmp_path / "source", tmp_path / "out").quantized_weights == 32


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_a_description_beside_the_config_is_pointed_out(name: str, tmp_path: Path) -> None:
    write_source(tmp_path / "source", GPTQ, packer(4, 32))
    describe(tmp_path / "source", quantization_config=None)
    (tmp_path / "source" / name).write_text(json.dumps(GPTQ))
    with pytest.raises(UnsupportedError, match=rf"{name} may tell: put what it says into config\.json"):
        compress(tmp_path / "source", tmp_path / "out")


def test_integers_beside_described_ones_are_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "source", GPTQ, packer(4, 32))
    save_file({"b.weight_packed": np.ones((4, 8), np.int32)}, tmp_path / "more.safetensors")
    tensors = plain_tensors(np.random.default_rng(0)) | {"b.weight_packed": np.ones((4, 8), np.int32)}
    generator = np.random.default_rng(5)
    pack: Packer = packer(4, 32)
    for layer, (rows, columns) in LINEARS.items():
        tensors |= {f"{layer}.{part}": array for part, array in pack(generator, rows, columns)[0].items()}
    write_folder(tmp_path / "mixed", tensors, {**CONFIG, "quantization_config": GPTQ})
    with pytest.raises(UnsupportedError, match=r"tensor 'b\.weight_packed' holds integers"):
        compress(tmp_path / "mixed", tmp_path / "out")


def test_fp8_of_two_axes_that_serves_as_a_scale_is_refused(tmp_path: Path) -> None:
    """As NVFP4 has it."""
    scale = np.ones((4, 2), ml_dtypes.float8_e4m3fn).view(np.uint8)
    header = {"a.weight": {"dtype": "U8", "shape": [4, 8], "data_offsets": [0, 32]}}
    header["a.weight_scale"] = {"dtype": "F8_E4M3", "shape": [4, 2], "data_offsets": [32, 40]}
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    content = np.ones((4, 8), np.uint8).tobytes() + scale.tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)
    with pytest.raises(FormatError, match=r"'a\.weight_scale' is F8_E4M3 and needs its scale"):
        Checkpoint.open(tmp_path)


def _dynamic(**dynamic: Any) -> dict[str, Any]:
    return {**GPTQ, "dynamic": dynamic}


def mixed_packer() -> Packer:
    """8 bits for matrices with more than 128 rows or columns, which are those of the MLP."""
    wide, narrow = packer(8, 32), packer(4, 32)
    return lambda generator, rows, columns: (wide if max(rows, columns) > 128 else narrow)(generator, rows, columns)


@pytest.mark.parametrize(
    "dynamic",
    [
        {"+:.*mlp.*": {"bits": 8}},
        {r".*\.mlp\..*": {"bits": 8, "group_size": 32}},
        {"-:.*lm_head": {}, r"+:model\.layers\.0\.mlp": {"bits": 8}, "+:.*": {"group_size": 32}},
    ],
)
def test_gptq_bits_may_differ_between_layers(dynamic: dict[str, Any], tmp_path: Path) -> None:
    expected = write_source(tmp_path / "source", _dynamic(**dynamic), mixed_packer())
    compress(tmp_path / "source", tmp_path / "out")
    found = imported_weights(tmp_path / "out")
    for name, weights in expected.items():
        np.testing.assert_array_equal(found[name], weights)


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"+:.*mlp.*": {"bits": 2}}, "words do not hold .* of 2 bits"),
        ({"+:.*mlp.*": {"bits": 5}}, r"quantization_config has bits 5; supported are \(2, 3, 4, 8\)"),
        ({"-:.*mlp.*": {}}, "is quantized, and dynamic in config.json says it is not"),
        ({"+:(": {"bits": 8}}, r"dynamic '\+:\(' of quantization_config"),
        ({"+:.*": 8}, "is not an object"),
    ],
)
def test_bits_that_do_not_fit_are_refused(dynamic: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_source(tmp_path / "source", _dynamic(**dynamic), mixed_packer())
    with pytest.raises((FormatError, UnsupportedError), match=message):
        compress(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("description", [{}, {"bits": 4, "foo": 1}])
def test_a_description_without_a_method_is_not_called_none(description: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="quantized by a method that it does not name") as raised:
        find_description(tmp_path / "config.json", {"quantization_config": description})
    assert "None" not in str(raised.value)
    assert all(key in str(raised.value) for key in description)


def test_a_format_without_schemes_has_no_empty_list(tmp_path: Path) -> None:
    description = {"quant_method": "compressed-tensors", "format": "sparse-24-bitmask"}
    with pytest.raises(UnsupportedError, match=r"in the format 'sparse-24-bitmask', which is not"):
        find_description(tmp_path / "config.json", {"quantization_config": description})
