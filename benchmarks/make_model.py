"""Write a Llama-shaped checkpoint with random weights of a stated entropy, for speed and memory benchmarks.

usage: python benchmarks/make_model.py SHAPE FOLDER [--entropy BITS]

The weights are bf16 multiples of a power of two whose integers have the stated entropy; every matrix holds both ends
of the 8-bit range, so that `entrollm compress --bits 8` finds exactly these integers again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from common import SEED, source

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {"hidden": 576, "layers": 30, "heads": 9, "kv_heads": 3, "inner": 1536, "vocab": 49152, "tied": True},
    "1.1B": {"hidden": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "inner": 5632, "vocab": 32000, "tied": False},
    "3.8B": {"hidden": 3072, "layers": 32, "heads": 32, "kv_heads": 32, "inner": 8192, "vocab": 32064, "tied": False},
}
_BASE = 1 << 24
_TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny-llama"


def main() -> None:
    """Write the checkpoint, one shard per layer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--entropy", type=float, default=3.0)
    arguments = parser.parse_args()
    write_model(SHAPES[arguments.shape], arguments.folder, arguments.entropy)


def write_model(shape: dict[str, Any], folder: Path, entropy: float) -> None:
    """Write config.json, the example model's tokenizer, and the weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(_TOKENIZER / name, folder / name)
    rng = np.random.default_rng(SEED)
    # The same step in every matrix; a scale that keeps activations near 1 through the layers.
    base = source(entropy, (_BASE >> 12, 1 << 12)).ravel().astype(np.int16) - 128
    step = 2.0 ** np.round(np.log2(1 / (base.std() * shape["hidden"] ** 0.5)))
    values = (base * step).astype(ml_dtypes.bfloat16)

    def matrix(rows: int, columns: int) -> NDArray[Any]:
        start = int(rng.integers(0, _BASE))
        tiled = np.take(values, np.arange(start, start + rows * columns), mode="wrap").reshape(rows, columns)
        tiled[0, 0], tiled[-1, -1] = -128 * step, 127 * step
        return tiled

    names: dict[str, str] = {}
    count = shape["layers"] + 1
    for index in range(count):
        tensors = _outer(shape, matrix) if index == count - 1 else _layer(shape, index, matrix)
        file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _config(shape: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["inner"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "vocab_size": shape["vocab"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": shape["tied"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }


def _layer(shape: dict[str, Any], index: int, matrix: Any) -> dict[str, NDArray[Any]]:
    hidden, inner = shape["hidden"], shape["inner"]
    kv = hidden // shape["heads"] * shape["kv_heads"]
    ones = np.ones(hidden, ml_dtypes.bfloat16)
    tensors = {
        "self_attn.q_proj": matrix(hidden, hidden),
        "self_attn.k_proj": matrix(kv, hidden),
        "self_attn.v_proj": matrix(kv, hidden),
        "self_attn.o_proj": matrix(hidden, hidden),
        "mlp.gate_proj": matrix(inner, hidden),
        "mlp.up_proj": matrix(inner, hidden),
        "mlp.down_proj": matrix(hidden, inner),
        "input_layernorm": ones,
        "post_attention_layernorm": ones.copy(),
    }
    return {f"model.layers.{index}.{name}.weight": tensor for name, tensor in tensors.items()}


def _outer(shape: dict[str, Any], matrix: Any) -> dict[str, NDArray[Any]]:
    tensors = {
        "model.embed_tokens.weight": matrix(shape["vocab"], shape["hidden"]),
        "model.norm.weight": np.ones(shape["hidden"], ml_dtypes.bfloat16),
    }
    if not shape["tied"]:
        tensors["lm_head.weight"] = matrix(shape["vocab"], shape["hidden"])
    return tensors


if __name__ == "__main__":
    main()
