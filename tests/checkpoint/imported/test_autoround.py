"""AutoRound checkpoints keep their integers, in each of their layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrollm.checkpoint.imported import expressions
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import FormatError, UnsupportedError
from tests.checkpoint.imported import test_awq, test_gptq
from tests.support.quantized_sources import Packer, write_source


def config(bits: Any = 4, **more: Any) -> dict[str, Any]:
    return {"quant_method": "auto-round", "bits": bits, "group_size": 32, "data_type": "int", "sym": True, **more}


CASES: dict[str, tuple[dict[str, Any], Packer]] = {
    "gptq": (config(packing_format="auto_round:auto_gptq"), test_gptq.packer(4, 32, index=False)),
    "2 bits": (
        config(2, packing_format="auto_round:gptqmodel"),
        test_gptq.packer(2, 32, layout="gptq_v2"),
    ),
    "plain": (config(8, packing_format="auto_round"), test_gptq.packer(8, 32, layout="gptq_v2", index=False)),
    "default": (config(8), test_gptq.packer(8, 32, index=False)),
    "awq": (config(packing_format="auto_round:auto_awq"), test_awq.pack),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_exactly_the_sources(case: str, tmp_path: Path) -> None:
    expected = write_source(tmp_path, *CASES[case])
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.quantization == "AutoRound" and checkpoint.imported.keys() == expected.keys()
        for name, weights in expected.items():
            np.testing.assert_array_equal(checkpoint.read_float32(name), weights)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", r"model\.layers\.\d+\.self_attn\.k_proj"])
def test_layers_have_bits_of_their_own(name: str, tmp_path: Path) -> None:
    def pack(generator: np.random.Generator, rows: int, columns: int) -> Any:
        return test_gptq.packer(8 if (rows, columns) == (64, 128) else 4, 32, index=False)(generator, rows, columns)

    extra = {name: {"bits": 8}, r"model\.layers\.0\.self_attn\.v_proj": {"bits": 8}, "lm_head": {"bits": 16}}
    expected = write_source(tmp_path, config(packing_format="auto_round:auto_gptq", extra_config=extra), pack)
    with Checkpoint.open(tmp_path) as checkpoint:
        for matrix, weights in expected.items():
            np.testing.assert_array_equal(checkpoint.read_float32(matrix), weights)


@pytest.mark.parametrize(
    ("description", "error", "message"),
    [
        (config(5, packing_format="auto_round:auto_gptq"), UnsupportedError, r"bits 5; supported are \(2, 3, 4, 8\)"),
        (
            config(data_type="fp8"),
            UnsupportedError,
            "AutoRound weights of 4 bits and data_type 'fp8'; supported are int",
        ),
        (config(packing_format="auto_round:x"), UnsupportedError, "in the packing_format 'auto_round:x'"),
        (
            config(packing_format="auto_round:gptqmodel:x"),
            UnsupportedError,
            "the packing_format 'auto_round:gptqmodel:x'",
        ),
        (config(backend="x:awq"), UnsupportedError, "in the packing_format 'x:awq', whose layout is not known"),
        (config(packing_format=3), FormatError, "packing_format is 3, expected a string"),
        (config(extra_config=[1]), FormatError, r"extra_config is \[1\], expected an object of objects"),
        (config(extra_config={"a{99999999999}": {"bits": 8}}), FormatError, r"extra_config 'a\{99999999999\}' of"),
        (config(extra_config={"(" * 5000 + ")" * 5000: {"bits": 8}}), FormatError, r"extra_config '\(\("),
        (config(extra_config={"a(": {"bits": 8}}), FormatError, r"extra_config 'a\(' of .*correct it"),
        (config(rotation_config={"a": 1}), UnsupportedError, "'auto-round' with a rotation_config, which rotates"),
        (config(spinquant_config={"a": 1}), UnsupportedError, "'auto-round' with a spinquant_config, which rotates"),
        (config(hadamard_config={"a": 1}), UnsupportedError, "'auto-round' with a hadamard_config, which rotates"),
    ],
)
def test_other_variants_are_refused(description: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    write_source(tmp_path, description, test_gptq.packer(4, 32))
    with pytest.raises(error, match=message):
        Checkpoint.open(tmp_path)


def test_stored_rotations_are_refused(tmp_path: Path) -> None:
    def pack(generator: np.random.Generator, rows: int, columns: int) -> Any:
        parts, weights = test_gptq.packer(4, 32, index=False)(generator, rows, columns)
        return {**parts, "hadamard_matrix": np.eye(columns, dtype=np.float32)}, weights

    write_source(tmp_path, config(), pack)
    with pytest.raises(UnsupportedError, match=r"\.hadamard_matrix: AutoRound weights with a rotation of their inputs"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("method", ["auto-round", "gptq"])
def test_expressions_that_take_for_ever_are_refused(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's regular expressions try each way to split a name, of which there are more than 2^30 here."""
    rule = {r"(([a-z_.0-9])+)+!": {"bits": 8}}
    named = {"dynamic": rule} if method == "gptq" else {"extra_config": rule}
    monkeypatch.setattr(expressions, "TIME_LIMIT_S", 0.5)
    write_source(tmp_path, config(**named) | {"quant_method": method}, test_gptq.packer(4, 32, index=False))
    with pytest.raises(
        FormatError, match=r"the regular expressions of quantization_config take more than 0\.5 seconds"
    ):
        Checkpoint.open(tmp_path)
