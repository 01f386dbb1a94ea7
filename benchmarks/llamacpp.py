"""llama.cpp as a peer: GGUF files of any Llama shape and type with random weights, and a model that is timed.

llama.cpp itself decides which tensor gets which type: its quantizer runs on a thin model with as many layers and the
same ratios of heads, and its choice is copied. The blocks of a tensor come from its quantizer too, a few random rows
of them repeated: its speed does not depend on the values.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

from common import SEED
from visit import visit_model

# File types by name, as llama.h numbers them.
TYPES = {
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q4_K_M": 15,
    "Q4_0": 2,
    "IQ4_XS": 30,
    "Q3_K_M": 12,
    "IQ3_S": 26,
    "Q2_K": 10,
}
CONTEXT = 640
_POOL_ROWS = 64
_SUPERBLOCK = 256
_UNQUANTIZED = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}


def write_gguf(shape: dict[str, Any], kind: str, path: Path) -> None:
    """Write a GGUF file of a shape (see make_model.SHAPES) in one of TYPES.

    Raises:
        ValueError: llama.cpp cannot quantize this shape to this type.
    """
    mix = tensor_types(shape, kind)
    writer = _writer(shape, path, TYPES[kind])
    shapes = _tensors(shape)
    pool = _Pool()
    for name, size in shapes.items():
        type_ = mix[name]
        row_bytes = pool.row_bytes(type_, size[-1])
        writer.add_tensor_info(name, (*size[:-1], row_bytes), np.dtype(np.uint8), _rows(size) * row_bytes, type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, size in shapes.items():
        writer.write_tensor_data(pool.tensor(mix[name], _rows(size), size[-1]))
    writer.close()


def tensor_types(shape: dict[str, Any], kind: str) -> dict[str, gguf.GGMLQuantizationType]:
    """Which type llama.cpp gives to each tensor of a shape."""
    if kind not in TYPES:
        raise ValueError(f"{kind!r} is not one of {', '.join(TYPES)}")
    # What decides is whether rows fill superblocks, the layer, and the ratio of heads to key-value heads.
    hidden = shape["hidden"] if shape["hidden"] % _SUPERBLOCK else max(_SUPERBLOCK, 2 * shape["heads"])
    thin = {**shape, "hidden": hidden, "inner": shape["inner"] % _SUPERBLOCK or 2 * _SUPERBLOCK, "vocab": _SUPERBLOCK}
    rng = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory(prefix="thin-") as folder:
        source, target = Path(folder) / "f32.gguf", Path(folder) / "quantized.gguf"
        writer = _writer(thin, source, 0)
        for name, size in _tensors(thin).items():
            writer.add_tensor(name, rng.standard_normal(size, dtype=np.float32) * 0.02)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        quantize(source, target, kind)
        return {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(target).tensors}


def quantize(
    source: Path, target: Path, kind: str, importance: Mapping[str, NDArray[np.float32]] | None = None
) -> None:
    """llama.cpp's own quantizer.

    Args:
        source, target: GGUF files.
        kind: one of TYPES.
        importance: the mean squares of the inputs of matrices, float32 (columns,), by their names in the file: what
            llama.cpp calls an importance matrix.

    Raises:
        ValueError: it refuses.
    """
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = TYPES[kind]
    parameters.nthread = os.cpu_count() or 1
    # An entry without a name ends the list.
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance or {}) + 1))()
    for entry, (name, squares) in zip(entries, (importance or {}).items(), strict=False):
        entry.name, entry.size = name.encode(), squares.size
        entry.data = squares.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if importance is not None:
        parameters.imatrix = entries
    with _Silence():
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if failed:
        raise ValueError(f"llama.cpp cannot quantize {source} to {kind}")


class Peer:
    """A GGUF model in llama.cpp.

    Args:
        path: the file.
        threads: for prompts and for single tokens.
        context: tokens that the cache has room for.
    """

    def __init__(self, path: Path, threads: int, context: int) -> None:
        llama_cpp.llama_backend_init()
        model_parameters = llama_cpp.llama_model_default_params()
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context
        parameters.n_threads = parameters.n_threads_batch = threads
        with _Silence():
            self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_parameters)
            if not self._model:
                raise ValueError(f"llama.cpp cannot load {path}")
            self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def generate(self, prompt: list[int], count: int) -> tuple[float, float, list[int]]:
        """Continue a prompt greedily: seconds for the prompt, seconds for all tokens after the first, the tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        start = time.perf_counter()
        tokens = [self._step(prompt)]
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(count - 1):
            tokens.append(self._step(tokens[-1:]))
        return prefill, time.perf_counter() - start, tokens

    def close(self) -> None:
        """Free the model."""
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _step(self, ids: list[int]) -> int:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (self._vocab,))
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise RuntimeError("llama.cpp's logits are not finite")
        return best


class _Silence:
    """Keep llama.cpp's log off the terminal."""

    _callback = llama_cpp.llama_log_callback(lambda level, text, data: None)

    def __enter__(self) -> None:
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def __exit__(self, *exception: object) -> None:
        return None


class _Pool:
    """Rows of random weights in every type, made once."""

    def __init__(self) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        library = ctypes.CDLL(str(next(folder.glob("libggml-base.so*"))))
        self._quantize = library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        self._rows: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self._rng = np.random.default_rng(SEED)

    def row_bytes(self, type_: gguf.GGMLQuantizationType, columns: int) -> int:
        """Bytes of one row."""
        block, size = gguf.GGML_QUANT_SIZES[type_]
        return columns // block * size

    def tensor(self, type_: gguf.GGMLQuantizationType, rows: int, columns: int) -> NDArray[np.uint8]:
        """The bytes of a tensor: uint8 (rows, row bytes); of ones for vectors, which are norms."""
        if rows == 1:
            return np.ones(columns, np.float32).view(np.uint8)[None]
        key = (int(type_), columns)
        if key not in self._rows:
            self._rows[key] = self._make(type_, columns)
        pool = self._rows[key]
        return np.take(pool, np.arange(rows) % _POOL_ROWS, axis=0)

    def _make(self, type_: gguf.GGMLQuantizationType, columns: int) -> NDArray[np.uint8]:
        weights = self._rng.standard_normal((_POOL_ROWS, columns), dtype=np.float32) * np.float32(columns**-0.5)
        if type_ in _UNQUANTIZED:
            dtype = np.float32 if type_ == gguf.GGMLQuantizationType.F32 else np.float16
            return weights.astype(dtype).view(np.uint8)
        out = np.zeros((_POOL_ROWS, self.row_bytes(type_, columns)), np.uint8)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (weights, out)]
        sizes = [ctypes.c_int64(value) for value in (0, _POOL_ROWS, columns)]
        written = self._quantize(int(type_), *pointers, *sizes, None)
        if written != out.nbytes:
            raise RuntimeError(f"ggml wrote {written} bytes of {type_.name}, expected {out.nbytes}")
        return out


def _rows(size: tuple[int, ...]) -> int:
    return size[0] if len(size) == 2 else 1


def _tensors(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = shape["hidden"], shape["inner"], shape["vocab"]
    kv = hidden // shape["heads"] * shape["kv_heads"]
    layer = {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if not shape["tied"]:
        tensors["output.weight"] = (vocab, hidden)
    for index in range(shape["layers"]):
        tensors |= {f"blk.{index}.{name}.weight": size for name, size in layer.items()}
    return tensors


def _writer(shape: dict[str, Any], path: Path, file_type: int) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    head = shape["hidden"] // shape["heads"]
    writer.add_context_length(2048)
    writer.add_embedding_length(shape["hidden"])
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["inner"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["vocab"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(file_type)
    return writer


def main() -> None:
    """Time one model, for generate.py; JSON on standard output."""
    parser = argparse.ArgumentParser(description="Time one GGUF file.")
    parser.add_argument("path", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--long", action="store_true")
    arguments = parser.parse_args()
    model = Peer(arguments.path, arguments.threads, CONTEXT)
    print(json.dumps(dataclasses.asdict(visit_model(model, arguments.count, arguments.long))))
    model.close()


if __name__ == "__main__":
    main()
