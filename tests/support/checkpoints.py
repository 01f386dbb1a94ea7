"""Small checkpoints to compress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def example_weights() -> dict[str, NDArray[Any]]:
    """Matrices of every type and sign, and tensors that keep their type."""
    generator = np.random.default_rng(21)

    def normal(*shape: int) -> NDArray[np.float32]:
        return (generator.standard_normal(shape) * 0.02).astype(np.float32)

    return {
        "embed.weight": normal(300, 96).astype(ml_dtypes.bfloat16),
        "layers.0.up.weight": normal(130, 4200).astype(ml_dtypes.bfloat16),
        "layers.0.down.weight": normal(64, 130).astype(np.float16),
        "layers.0.norm.weight": normal(96).astype(ml_dtypes.bfloat16),
        "layers.1.positive.weight": np.abs(normal(50, 70)),
        "layers.1.constant.weight": np.full((9, 65), 0.5, np.float32),
        "layers.1.zero.weight": np.zeros((5, 5), np.float32),
        "layers.1.empty.weight": np.zeros((0, 5), np.float32),
        "layers.1.bias": normal(130),
        "head.weight": normal(200, 96),
    }


def write_checkpoint(path: Path, weights: dict[str, NDArray[Any]] | None = None) -> Path:
    """A checkpoint of two shards with an index, a configuration and a tokenizer file."""
    weights = example_weights() if weights is None else weights
    path.mkdir(parents=True)
    names = list(weights)
    halves = {SHARDS[0]: names[: len(names) // 2], SHARDS[1]: names[len(names) // 2 :]}
    weight_map = {}
    for file, members in halves.items():
        save_file({name: np.ascontiguousarray(weights[name]) for name in members}, path / file)
        weight_map |= dict.fromkeys(members, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 96}))
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("not copied")
    return path
