"""export writes an ordinary checkpoint of the dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from entrollm import _core
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.cli.console import describe_error
from entrollm.compress import compress_folder
from entrollm.compress.export import export
from entrollm.files.dtypes import DTYPES
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from tests.support.checkpoints import example_weights, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    compress_folder(write_checkpoint(root / "model"), root / "out")
    return root / "out"


@pytest.mark.parametrize("dtype", ["original", "bf16", "f16", "f32"])
def test_the_weights_are_the_dequantized_ones(folder: Path, tmp_path: Path, dtype: str) -> None:
    pool = _core.ThreadPool(2)
    with CompressedModel.open(folder) as model:
        result = export(model, tmp_path / "plain", pool, dtype)  # type: ignore[arg-type]
        with Checkpoint.open(tmp_path / "plain") as exported:
            assert set(exported.tensors) == set(example_weights())
            for name, spec in model.specs.items():
                stored = spec.dtype if dtype == "original" else dtype.upper()
                assert exported.tensors[name].dtype == stored
                values = matrix_of(model, name).dequantize(np.arange(spec.rows, dtype=np.int64), pool)
                expected = values.astype(DTYPES[stored])
                assert exported.read(name).tobytes() == expected.tobytes(), name
            for name in model.plain:
                assert exported.read(name).tobytes() == model.array(name).tobytes()
    assert result.weights == sum(array.size for array in example_weights().values())
    assert result.file_bytes == (tmp_path / "plain" / "model.safetensors").stat().st_size


def test_the_folder_is_an_ordinary_one(folder: Path, tmp_path: Path) -> None:
    with CompressedModel.open(folder) as model:
        export(model, tmp_path / "plain", _core.ThreadPool(1), "bf16")
    names = {file.name for file in (tmp_path / "plain").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    with safe_open(tmp_path / "plain" / "model.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert {path.name for path in tmp_path.iterdir()} == {"plain"}


def test_an_unknown_type_is_refused(folder: Path, tmp_path: Path) -> None:
    with (
        CompressedModel.open(folder) as model,
        pytest.raises(ValueError, match="dtype must be original, bf16, f16, f32; found 'int8'"),
    ):
        export(model, tmp_path / "plain", _core.ThreadPool(1), "int8")  # type: ignore[arg-type]


def test_an_existing_folder_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "mine.txt").write_text("mine")
    with CompressedModel.open(folder) as model, pytest.raises(ValueError, match="plain exists and is not empty"):
        export(model, tmp_path / "plain", _core.ThreadPool(1))
    with (
        CompressedModel.open(folder) as model,
        pytest.raises(ValueError, match="name a folder that does not exist") as no,
    ):
        export(model, folder, _core.ThreadPool(1))
    assert "overwrite" not in describe_error(no.value)
