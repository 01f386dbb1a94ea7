"""Tensors of another rank, type or kind than config.json asks for are refused by name, compressed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from entrollm import CompressOptions, EntroLLMError, compress, load
from tests.support.checkpoints import write_random_llama
from tests.support.folders import change_header

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return write_random_llama(tmp_path / "model", layers=1, tied=False)


def store(checkpoint: Path, name: str, values: NDArray[Any]) -> None:
    file = checkpoint / "model.safetensors"
    save_file({**load_file(file), name: values}, file)


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (EMBEDDING, (512 * 64,)),
        (EMBEDDING, ()),
        (EMBEDDING, (2, 256, 64)),
        (EMBEDDING, (1, 2, 256, 64)),
        (NORM, (64, 64)),
        (NORM, ()),
        (NORM, (1, 64)),
        (NORM, (1, 1, 64)),
        ("model.layers.0.self_attn.q_proj.weight", (64,)),
        ("model.layers.0.mlp.up_proj.weight", (1, 128, 64)),
        ("lm_head.weight", (512 * 64,)),
    ],
)
def test_another_rank(checkpoint: Path, name: str, shape: tuple[int, ...], is_compressed: bool) -> None:
    store(checkpoint, name, np.ones(shape, np.float32))
    folder = checkpoint
    with pytest.raises(EntroLLMError, match=name.replace(".", r"\.")):
        if is_compressed:
            folder = checkpoint.parent / "coded"
            compress(checkpoint, folder, CompressOptions(bits=8))
        load(folder)


@pytest.mark.parametrize(("name", "keep"), [(NORM, ()), (EMBEDDING, (EMBEDDING,))])
@pytest.mark.parametrize("dtype", ["I32", "U32"])
def test_another_type(checkpoint: Path, name: str, keep: tuple[str, ...], dtype: str) -> None:
    folder = checkpoint.parent / "coded"
    compress(checkpoint, folder, CompressOptions(bits=8, keep=keep))
    for path in (folder, checkpoint):

        def change(header: dict[str, Any]) -> None:
            header[name]["dtype"] = dtype

        change_header(path / "model.safetensors", change)
        with pytest.raises(EntroLLMError, match=name.replace(".", r"\.")):
            load(path)
