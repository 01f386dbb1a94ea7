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


def write_random_llama(path: Path, layers: int, tied: bool) -> Path:
    """A Llama of 512 tokens and 64 columns that can be run, in a folder that is there."""
    generator = np.random.default_rng(4)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (512, 64), "model.norm": (64,)}
    if not tied:
        shapes["lm_head"] = (512, 64)
    for prefix in (f"model.layers.{layer}." for layer in range(layers)):
        shapes |= {f"{prefix}self_attn.{name}_proj": (64, 64) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj": (128, 64) for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj": (64, 128)}
        shapes |= {f"{prefix}{name}_layernorm": (64,) for name in ("input", "post_attention")}
    tensors = {
        f"{name}.weight": (generator.standard_normal(shape) * 0.2 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, path / "model.safetensors")
    config = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


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
