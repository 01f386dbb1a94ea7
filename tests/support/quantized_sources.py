"""Small Llama checkpoints in the layouts of quantized models, packed field by field, and the weights that they mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from entrollm import _core
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of

Arrays = dict[str, NDArray[Any]]
# Packs one linear layer: (generator, rows, columns) to its tensors by their last name, and its float32 weights.
Packer = Callable[[np.random.Generator, int, int], tuple[Arrays, NDArray[np.float32]]]

# The engine rounds activations to 16 bits and does not round products of half-precision scales as the source does.
TOLERANCE = 1e-3
HIDDEN, INTERMEDIATE, VOCABULARY = 128, 256, 320
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
}
_LAYER = "model.layers.0."
LINEARS = {
    _LAYER + "self_attn.q_proj": (128, 128),
    _LAYER + "self_attn.k_proj": (64, 128),
    _LAYER + "self_attn.v_proj": (64, 128),
    _LAYER + "self_attn.o_proj": (128, 128),
    _LAYER + "mlp.gate_proj": (256, 128),
    _LAYER + "mlp.up_proj": (256, 128),
    _LAYER + "mlp.down_proj": (128, 256),
}


def plain_tensors(generator: np.random.Generator) -> Arrays:
    """The tensors that no format quantizes."""
    normal = generator.standard_normal
    return {
        "model.embed_tokens.weight": normal((VOCABULARY, HIDDEN)).astype(np.float16),
        _LAYER + "input_layernorm.weight": (1 + 0.1 * normal(HIDDEN)).astype(np.float16),
        _LAYER + "post_attention_layernorm.weight": (1 + 0.1 * normal(HIDDEN)).astype(np.float16),
        "model.norm.weight": np.ones(HIDDEN, np.float16),
        "lm_head.weight": (normal((VOCABULARY, HIDDEN)) / 11).astype(np.float16),
    }


def write_source(folder: Path, quantization: Mapping[str, Any], pack: Packer) -> dict[str, NDArray[np.float32]]:
    """Write a quantized checkpoint; returns the weights of its linear layers."""
    generator = np.random.default_rng(5)
    tensors = plain_tensors(generator)
    expected = {}
    for name, (rows, columns) in LINEARS.items():
        parts, weights = pack(generator, rows, columns)
        tensors |= {f"{name}.{part}": np.ascontiguousarray(array) for part, array in parts.items()}
        expected[name + ".weight"] = weights
    write_folder(folder, tensors, {**CONFIG, "quantization_config": dict(quantization)})
    return expected


def write_folder(folder: Path, tensors: Arrays, config: Mapping[str, Any]) -> Path:
    """A checkpoint of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_dense(folder: Path, expected: Mapping[str, NDArray[np.float32]]) -> Path:
    """The same model as float32, its linear layers given as weights."""
    tensors = {name: array.astype(np.float32) for name, array in plain_tensors(np.random.default_rng(5)).items()}
    return write_folder(folder, tensors | dict(expected), CONFIG)


def imported_weights(folder: Path) -> dict[str, NDArray[np.float32]]:
    """The dequantized matrices of a compressed folder."""
    with CompressedModel.open(folder) as model:
        pool = _core.ThreadPool(1)
        return {
            name: matrix_of(model, name).dequantize(np.arange(spec.rows, dtype=np.int64), pool)
            for name, spec in model.specs.items()
        }


def change_tensors(folder: Path, change: Callable[[Arrays], None]) -> None:
    """Rewrite a checkpoint's file with changed tensors."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")


def pack_fields(values: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """Each row's numbers as one long integer, lowest first, cut into 32-bit words."""
    rows, columns = values.shape
    words = -(-columns * bits // 32)
    packed = np.zeros((rows, words), np.uint32)
    for i, row in enumerate(values.tolist()):
        number = sum(int(value) << (bits * j) for j, value in enumerate(row))
        packed[i] = np.frombuffer(number.to_bytes(words * 4, "little"), "<u4")
    return packed.view(np.int32)


def random_scales(generator: np.random.Generator, shape: tuple[int, int], bits: int, columns: int) -> NDArray[Any]:
    """Scales at which weights of `bits` bits are about 1 / sqrt(columns)."""
    return (generator.uniform(0.5, 1.5, shape) * 3 / (2**bits * columns**0.5)).astype(np.float16)


def as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """From any float type."""
    return np.asarray(values, dtype=np.float32) if values.dtype != ml_dtypes.bfloat16 else values.astype(np.float32)
