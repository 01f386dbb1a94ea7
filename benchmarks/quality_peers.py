"""What quality is compared with: group-wise grids (plain, HQQ, GPTQ) in simple form, and llama.cpp's own types.

Every peer gives the weights that it would multiply with, in float32, and the bits that they take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from entrollm.models.config import ModelConfig
from llamacpp import TYPES, quantize

Floats = NDArray[np.float32]
Tensors = dict[str, Floats]

GROUP = 128
# A scale and an offset of 16 bits for each group.
_GROUP_BITS = 32
# GPTQ's default: what is added to the diagonal of the moments, as a share of its mean.
_GPTQ_DAMPING = 0.01
# Weights that a superblock of llama.cpp takes from one row.
_BLOCK = 256
# HQQ's defaults (lp_norm, beta, kappa, iterations).
_HQQ_NORM, _HQQ_BETA, _HQQ_GROWTH, _HQQ_ROUNDS = 0.7, 10.0, 1.01, 20


@dataclass(frozen=True)
class Peer:
    """A model quantized by another method.

    Attributes:
        name, family: of the row and of its curve.
        tensors: what it multiplies with.
        file_bits: per weight of the whole model.
        note: what must be known to read the figure.
    """

    name: str
    family: str
    tensors: Tensors
    file_bits: float
    note: str = ""


def group_peers(
    tensors: Tensors, moments: Callable[[], Tensors] | None, widths: tuple[int, ...], measured: Container[str]
) -> Iterator[Peer]:
    """All matrices on grids of `widths` bits per group of 128 inputs; vectors stay in 16 bits.

    Args:
        tensors: the original's weights.
        moments: gives mean products of the inputs of matrices, (columns, columns), by the matrices' names, for GPTQ;
            `None` to leave it out. GPTQ only rounds to nearest where a matrix has none.
        widths: bits of a weight.
        measured: names of peers to leave out.
    """
    methods: dict[str, Callable[[str, Floats, int], Floats]] = {
        "RTN": lambda name, weight, width: _round_groups(weight, width),
        "HQQ": lambda name, weight, width: _hqq(weight, width),
    }
    if moments is not None:
        methods["GPTQ"] = lambda name, weight, width: _gptq(weight, moments().get(name), width)
    weights = sum(tensor.size for tensor in tensors.values())
    for family, method in methods.items():
        for width in widths:
            if (peer := f"{family} {width} bits g{GROUP}") in measured:
                continue
            made = {name: method(name, t, width) if t.ndim == 2 else t for name, t in tensors.items()}
            bits = sum(
                t.size * width + -(-t.shape[1] // GROUP) * t.shape[0] * _GROUP_BITS if t.ndim == 2 else t.size * 16
                for t in tensors.values()
            )
            yield Peer(peer, f"{family} g{GROUP}", made, bits / weights)


def _grid(weight: Floats, width: int) -> tuple[Floats, Floats]:
    """Scale and zero point of each row's range, 0 included."""
    low = np.minimum(weight.min(axis=1, keepdims=True), 0)
    high = np.maximum(weight.max(axis=1, keepdims=True), 0)
    scale = np.maximum((high - low) / (2**width - 1), np.finfo(np.float32).tiny)
    return scale, np.rint(-low / scale)


def _on_grid(weight: Floats, scale: Floats, zero: Floats, width: int) -> Floats:
    levels: Floats = np.clip(np.rint(weight / scale + zero), 0, 2**width - 1)
    return levels


def _groups(columns: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + GROUP, columns)) for begin in range(0, columns, GROUP)]


def _round_groups(weight: Floats, width: int) -> Floats:
    out = np.empty_like(weight)
    for begin, end in _groups(weight.shape[1]):
        scale, zero = _grid(weight[:, begin:end], width)
        out[:, begin:end] = (_on_grid(weight[:, begin:end], scale, zero, width) - zero) * scale
    return out


def _hqq(weight: Floats, width: int) -> Floats:
    """Half-quadratic quantization (mobiusml.github.io/hqq_blog): zero points for an lp norm of the error, p < 1."""
    out = np.empty_like(weight)
    for begin, end in _groups(weight.shape[1]):
        part = weight[:, begin:end]
        scale, zero = _grid(part, width)
        beta = _HQQ_BETA
        for _ in range(_HQQ_ROUNDS):
            levels = _on_grid(part, scale, zero, width)
            error = part - (levels - zero) * scale
            size = np.abs(error)
            shrunk = np.sign(error) * np.maximum(0, size - np.maximum(size, 1e-8) ** (_HQQ_NORM - 1) / beta)
            zero = np.mean(levels - (part - shrunk) / scale, axis=1, keepdims=True)
            beta *= _HQQ_GROWTH
        out[:, begin:end] = (_on_grid(part, scale, zero, width) - zero) * scale
    return out


def _gptq(weight: Floats, moments: Floats | None, width: int) -> Floats:
    """GPTQ (arXiv 2210.17323): columns from the last to the first, each group's grid from what is left of it."""
    if moments is None:
        return _round_groups(weight, width)
    damping = _GPTQ_DAMPING * moments.trace(dtype=np.float64) / len(moments)
    factor = np.linalg.cholesky(moments.astype(np.float64) + damping * np.eye(len(moments))).astype(np.float32)
    left = weight @ factor
    out = np.empty_like(weight)
    for begin, end in reversed(_groups(weight.shape[1])):
        updated = np.linalg.solve(factor[:end, :end].T.astype(np.float64), left[:, :end].T.astype(np.float64)).T
        scale, zero = _grid(updated[:, begin:end].astype(np.float32), width)
        for i in range(end - 1, begin - 1, -1):
            level = _on_grid(left[:, i : i + 1] / factor[i, i], scale, zero, width)
            out[:, i] = ((level - zero) * scale)[:, 0]
            left[:, : i + 1] -= np.outer(out[:, i], factor[i, : i + 1])
    return out


def given_title(has_matrix: bool, joins_rows: bool) -> str:
    """What follows the name of a type of llama.cpp that was given an importance matrix, or joined rows."""
    return (", matrix" if has_matrix else "") + (", joined rows" if joins_rows else "")


@dataclass(frozen=True)
class LlamaCpp:
    """What llama.cpp's quantizer is given.

    Attributes:
        importance: mean squares of the inputs of matrices, by their names in the checkpoint; None for none.
        joins_rows: whether as many rows as fill blocks of 256 are given as one, where a row does not. Such files run
            nowhere; they say what the types would do on a model of another width.
        kinds: the file types.
    """

    importance: Tensors | None = None
    joins_rows: bool = False
    kinds: tuple[str, ...] = tuple(TYPES)

    @property
    def title(self) -> str:
        """What follows the name of a type."""
        return given_title(self.importance is not None, self.joins_rows)

    def rows(self, shape: tuple[int, ...]) -> int:
        """How many rows of a matrix are given as one."""
        joined = _BLOCK // math.gcd(_BLOCK, shape[-1])
        return joined if self.joins_rows and len(shape) == 2 and shape[0] % joined == 0 else 1


def llamacpp_peers(tensors: Tensors, config: ModelConfig, folder: Path, given: LlamaCpp) -> Iterator[Peer]:
    """llama.cpp's quantizer on the model; sizes are those of the GGUF files."""
    source = folder / "f32.gguf"
    write_gguf(tensors, config, source, given)
    weights = sum(tensor.size for tensor in tensors.values())
    squares = {
        gguf_name(name, config): np.tile(values, given.rows(tensors[name].shape))
        for name, values in (given.importance or {}).items()
    }
    for kind in given.kinds:
        target = folder / f"{kind}.gguf"
        quantize(source, target, kind, squares or None)
        made, types = _read_gguf(target, config, {name: tensor.shape for name, tensor in tensors.items()})
        peer = kind + given.title, f"llama.cpp{given.title}"
        yield Peer(*peer, made, target.stat().st_size * 8 / weights, shares(types))
        target.unlink()


def shares(types: dict[str, int]) -> str:
    """How much of the weights has which type."""
    total = sum(types.values())
    most_first = sorted(types.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in most_first if count > 0.005 * total)


# Parts of a layer by their names in the checkpoint; Gemma 3 has other norms than Llama.
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAMES_BY_TYPE = {
    "llama": _LAYER_NAMES | {"post_attention_layernorm": "ffn_norm"},
    "gemma3_text": _LAYER_NAMES
    | {
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
_ARCHITECTURES = {"llama": "llama", "gemma3_text": "gemma3"}


def gguf_name(name: str, config: ModelConfig) -> str:
    """The name of a checkpoint's tensor in a GGUF file."""
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, suffix = name.rpartition(".")
    if stem in fixed:
        return f"{fixed[stem]}.{suffix}"
    _, _, index, rest = stem.split(".", 3)
    return f"blk.{index}.{_NAMES_BY_TYPE[config.model_type][rest]}.{suffix}"


def _interleave(weight: Floats, heads: int) -> Floats:
    """Rows of queries or keys in GGUF's order: the two halves of every head alternate."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _joined(weight: Floats, rows: int) -> Floats:
    return np.ascontiguousarray(weight if rows == 1 else weight.reshape(-1, rows * weight.shape[1]))


def restored(values: NDArray[np.generic], name: str, shape: tuple[int, ...], config: ModelConfig) -> Floats:
    """A tensor of a GGUF file as the checkpoint has it, in float32, with its rows in their own order."""
    weight = values.astype(np.float32).reshape(shape)
    heads = _heads(name, config)
    return weight.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape) if heads else weight


def _heads(name: str, config: ModelConfig) -> int:
    """Heads whose rows GGUF orders differently; 0 if none are."""
    if config.model_type != "llama":
        return 0
    if name.endswith("q_proj.weight"):
        return config.num_heads
    return config.num_kv_heads if name.endswith("k_proj.weight") else 0


def write_gguf(tensors: Tensors, config: ModelConfig, path: Path, given: LlamaCpp) -> None:
    """A GGUF file of the model in float32, with rows joined as `given` says. It is for quantizers and does not run."""
    if config.model_type not in _ARCHITECTURES:
        raise ValueError(f"GGUF files are written for {', '.join(_ARCHITECTURES)}, found {config.model_type}")
    writer = gguf.GGUFWriter(path, _ARCHITECTURES[config.model_type])
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.context_length)  # llama.cpp does not open the file without one
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(0)
    for name, tensor in tensors.items():
        heads = _heads(name, config)
        ordered = _interleave(tensor, heads) if heads else tensor
        writer.add_tensor(gguf_name(name, config), _joined(ordered, given.rows(tensor.shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_gguf(
    path: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Tensors, dict[str, int]]:
    """The weights under their names in the checkpoint, and how many of them have each type."""
    names = {gguf_name(name, config): name for name in shapes}
    found: Tensors = {}
    types: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = names[tensor.name]
        found[name] = restored(dequantize(tensor.data, tensor.tensor_type), name, shapes[name], config)
        kind = tensor.tensor_type.name
        types[kind] = types.get(kind, 0) + found[name].size
    return found, types
