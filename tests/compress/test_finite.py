"""NaN and infinities are refused wherever they are: in matrices, and in what is kept in its type."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import entrollm
from entrollm import CompressOptions, _core, compress
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.verify import verify
from entrollm.errors import FormatError
from entrollm.files.dtypes import check_finite
from entrollm.format.reader import CompressedModel
from tests.support.quantized_sources import CONFIG, LINEARS, plain_tensors, write_folder

NORM, MATRIX = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"


def write(folder: Path, name: str, value: float, dtype: Any) -> Path:
    tensors = plain_tensors(np.random.default_rng(0))
    tensors |= {f"{layer}.weight": np.ones(shape, np.float32) for layer, shape in LINEARS.items()}
    tensors["model.layers.0.mlp.up_proj.bias"] = np.ones(256, np.float32)
    tensors[name] = tensors[name].astype(dtype)
    tensors[name].reshape(-1)[3] = value
    return write_folder(folder, tensors, CONFIG)


@pytest.mark.parametrize("name", [NORM, "model.norm.weight", "model.layers.0.mlp.up_proj.bias", MATRIX])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_compress_refuses_them(name: str, value: float, tmp_path: Path) -> None:
    source = write(tmp_path / "source", name, value, np.float32)
    with pytest.raises(FormatError, match=name):
        compress(source, tmp_path / "out", CompressOptions(bits=8))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_types_of_kept_tensors(dtype: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "source", NORM, np.nan, dtype)
    with pytest.raises(FormatError, match=rf"{NORM}: the value at \(3,\) is nan"):
        compress(source, tmp_path / "out", CompressOptions(bits=8))


def test_a_matrix_that_is_kept_is_looked_at(tmp_path: Path) -> None:
    source = write(tmp_path / "source", MATRIX, np.nan, np.float32)
    with pytest.raises(FormatError, match=rf"{MATRIX}: the value at \(0, 3\) is nan"):
        compress(source, tmp_path / "out", CompressOptions(bits=8, overrides={MATRIX: None}))


def test_the_engine_refuses_them_in_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=NORM):
        entrollm.load(write(tmp_path / "source", NORM, np.nan, np.float32))


def test_verify_and_the_engine_refuse_them_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of earlier versions may hold some."""
    source = write(tmp_path / "source", NORM, np.nan, np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["entrollm.compress.shard"], "check_finite", lambda name, values: None)
        compress(source, tmp_path / "out", CompressOptions(bits=8))
    with CompressedModel.open(tmp_path / "out") as model, Checkpoint.open(source) as original:
        for other in (None, original):
            with pytest.raises(FormatError, match=NORM):
                verify(model, _core.ThreadPool(1), other)
    with pytest.raises(FormatError, match=NORM):
        entrollm.load(tmp_path / "out")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, np.float16, np.float32, np.float64])
def test_every_float_type_is_checked(dtype: Any) -> None:
    values = np.ones((2, 3)).astype(dtype)
    check_finite("x", values)
    values[1, 2] = np.inf
    with pytest.raises(FormatError, match=r"x: the value at \(1, 2\) is inf"):
        check_finite("x", values)
    check_finite("text.causal_mask", values)
    values[0, 1] = np.nan
    with pytest.raises(FormatError, match=r"x_mask: the value at \(0, 1\) is nan"):
        check_finite("x_mask", values)


def test_integers_and_scalars_pass() -> None:
    check_finite("x", np.arange(3))
    check_finite("x", np.array(1.5, np.float32))
    check_finite("x", np.zeros((0, 3), np.float32))
    with pytest.raises(FormatError, match=r"x: the value at \(\) is nan"):
        check_finite("x", np.array(np.nan, np.float32))
