"""What importing quantized checkpoints saves: a model is rounded into each format, imported, and compared bit for bit.

usage: python benchmarks/imports.py [CHECKPOINT] [--random] [--folder FOLDER] [--threads N] [--json FILE]

Weights are rounded to nearest, with the extremes of each group at the ends of its grid; GPTQ's and AWQ's own choices
of integers have about the same entropy. GGUF files are llama.cpp's own. The table is Markdown, as in
docs/guide/importing.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from common import SEED, finish
from entrollm import CompressOptions, _core, compress
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.verify import verify
from entrollm.format.reader import CompressedModel

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llama"
GGUF_TYPES = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0")
Arrays = dict[str, NDArray[Any]]
Float32 = NDArray[np.float32]


def grid(
    weights: Float32, bits: int, size: int, symmetric: bool = False, whole_zeros: bool = True
) -> tuple[NDArray[np.uint32], Float32, Float32]:
    """Integers from 0 on, scales and zeros of groups of a row: (rows, columns), (rows, groups) twice."""
    grouped = weights.reshape(len(weights), -1, size)
    low, high = grouped.min(axis=2), grouped.max(axis=2)
    if symmetric:
        low, high = -np.maximum(high, -low), np.maximum(high, -low)
    scale = np.maximum((high - low) / (2**bits - 1), 1e-8).astype(np.float16).astype(np.float32)
    zero = np.full_like(low, 2 ** (bits - 1)) if symmetric else np.clip(-low / scale, 0, 2**bits - 1)
    if whole_zeros:
        zero = np.rint(zero)
    integers = np.clip(np.rint(grouped / scale[..., None] + zero[..., None]), 0, 2**bits - 1)
    return integers.astype(np.uint32).reshape(weights.shape), scale, zero


def words(integers: NDArray[np.uint32], bits: int, order: tuple[int, ...] | None = None) -> NDArray[np.int32]:
    """32-bit words of the fields of each row; field i of a word has the number order[i] of its run."""
    fields = 32 // bits
    runs = integers.reshape(len(integers), -1, fields)[..., list(order or range(fields))]
    packed = (runs << (np.arange(fields, dtype=np.uint32) * np.uint32(bits))).sum(axis=2, dtype=np.uint32)
    return np.ascontiguousarray(packed).view(np.int32)


def gptq(symmetric: bool) -> Callable[[Float32], Arrays]:
    def pack(weights: Float32) -> Arrays:
        integers, scale, zero = grid(weights, 4, 128, symmetric)
        zeros = np.maximum(zero, 1).astype(np.uint32).T - 1
        return {
            "qweight": words(integers, 4).T,
            "qzeros": words(zeros, 4),
            "scales": scale.T.astype(np.float16),
            "g_idx": np.arange(weights.shape[1], dtype=np.int32) // 128,
        }

    return pack


def awq(weights: Float32) -> Arrays:
    integers, scale, zero = grid(weights, 4, 128)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    zeros = zero.astype(np.uint32)
    return {
        "qweight": words(np.ascontiguousarray(integers.T), 4, order),
        "qzeros": words(np.ascontiguousarray(zeros.T), 4, order),
        "scales": scale.T.astype(np.float16),
    }


def packed_groups(weights: Float32) -> Arrays:
    integers, scale, _ = grid(weights, 4, 32, symmetric=True)
    shape = np.array(weights.shape, np.int64)
    return {
        "weight_packed": words(integers, 4),
        "weight_shape": shape,
        "weight_scale": scale.astype(ml_dtypes.bfloat16),
    }


def int8_rows(weights: Float32) -> Arrays:
    scale = np.abs(weights).max(axis=1, keepdims=True) / 127
    return {"weight": np.rint(weights / scale).astype(np.int8), "weight_scale": scale.astype(ml_dtypes.bfloat16)}


def bitsandbytes(weights: Float32) -> Arrays:
    largest = np.abs(weights).max(axis=1)
    integers = np.rint(weights * (127 / largest)[:, None]).astype(np.int8)
    return {"weight": integers, "SCB": largest, "weight_format": np.array(0, np.uint8)}


def hqq(weights: Float32) -> Arrays:
    integers, scale, zero = grid(weights, 4, 64, whole_zeros=False)
    fields = integers.reshape(-1, 64).astype(np.uint8)
    half = len(fields) // 2
    texts = {"packing": "4bit_u8", "compute_dtype": "torch.float16"}
    return {
        "W_q": fields[:half] << 4 | fields[half:],
        "scale": scale.reshape(-1, 1).astype(np.float16),
        "zero": zero.reshape(-1, 1).astype(np.float16),
        "shape": np.array(weights.shape, np.int64),
        "group_size": np.array(64, np.int32),
        "axis": np.array(1, np.int32),
        **{key: np.frombuffer(text.encode(), np.uint8) for key, text in texts.items()},
    }


def fp8_rows(weights: Float32) -> Arrays:
    scale = (np.abs(weights).max(axis=1, keepdims=True) / 448).astype(ml_dtypes.bfloat16)
    octets = np.clip(weights / scale.astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": octets, "weight_scale": scale}


def _compressed_tensors(kind: str, type_: str) -> dict[str, Any]:
    weights = {"type": type_, "num_bits": 8}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": {"weights": weights}}}


FORMATS: dict[str, tuple[dict[str, Any], Callable[[Float32], Arrays]]] = {
    "GPTQ, 4 bits, groups of 128": ({"quant_method": "gptq", "bits": 4}, gptq(symmetric=False)),
    "GPTQ, the same, symmetric": ({"quant_method": "gptq", "bits": 4}, gptq(symmetric=True)),
    "AWQ, 4 bits, groups of 128": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
    "compressed-tensors, 4 bits, groups of 32": (_compressed_tensors("pack-quantized", "int"), packed_groups),
    "compressed-tensors, 8 bits, rows": (_compressed_tensors("int-quantized", "int"), int8_rows),
    "compressed-tensors, fp8, rows": (_compressed_tensors("float-quantized", "float"), fp8_rows),
    "bitsandbytes, 8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes),
    "HQQ, 4 bits, groups of 64": ({"quant_method": "hqq"}, hqq),
}


def is_linear(name: str) -> bool:
    """Whether quantizers of linear layers take a tensor."""
    return name.endswith("_proj.weight")


def write_source(original: Checkpoint, name: str, folder: Path) -> Path:
    """The checkpoint in one of FORMATS."""
    quantization, pack = FORMATS[name]
    folder.mkdir(parents=True)
    tensors: Arrays = {}
    for tensor in original.tensors:
        if is_linear(tensor):
            layer = tensor.removesuffix("weight")
            parts = pack(original.read_float32(tensor))
            tensors |= {layer + part: np.ascontiguousarray(array) for part, array in parts.items()}
        else:
            tensors[tensor] = original.read(tensor)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(original.config | {"quantization_config": quantization}))
    return folder


def write_gguf(original: Checkpoint, kind: str, folder: Path) -> Path | None:
    """The checkpoint in a type of llama.cpp, by its quantizer; None where llama.cpp is not installed."""
    try:
        import gguf
        import llama_cpp
    except ImportError:
        return None
    folder.mkdir(parents=True)
    config, full, path = original.config, folder / "full.gguf", folder / "model.gguf"
    writer = gguf.GGUFWriter(str(full), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name in original.tensors:
        # Rows of q and k are left as they are: the file is only measured.
        theirs = names.get_name(name, try_suffixes=(".weight",))
        if theirs is None:
            raise ValueError(f"llama.cpp has no name for {name}")
        writer.add_tensor(theirs, original.read_float32(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(str(full).encode(), str(path).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp does not quantize this model to {kind}")
    return path


def measure(source: Path, out: Path, threads: int) -> dict[str, Any]:
    """Import a source, check that every weight is its own, and return the bits."""
    tokenizer = out.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    result = compress(source, out, CompressOptions(tokenizer=tokenizer, threads=threads))
    with CompressedModel.open(out) as model, Checkpoint.open(source) as original:
        verify(model, _core.ThreadPool(threads), original)
    if result.imported is None:
        raise AssertionError(f"{source} was quantized, not imported")
    bits = ("source_bits", "stored_bits", "entropy_bits")
    return {"weights": result.imported.weights, **{key: getattr(result.imported, key) for key in bits}}


def random_checkpoint(folder: Path) -> Path:
    """One Llama layer of a 1B model with Gaussian weights: large matrices, but unlike trained ones."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(SEED)
    config = json.loads((EXAMPLE / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1, "vocab_size": 256}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
    shapes = {"self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (512, 2048), "self_attn.v_proj": (512, 2048)}
    shapes |= {"self_attn.o_proj": (2048, 2048), "mlp.gate_proj": (8192, 2048), "mlp.up_proj": (8192, 2048)}
    shapes |= {"mlp.down_proj": (2048, 8192)}
    tensors = {
        f"model.layers.0.{name}.weight": (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }
    norms = ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm")
    tensors |= {f"{name}.weight": np.ones(2048, ml_dtypes.bfloat16) for name in norms}
    tensors["model.embed_tokens.weight"] = rng.standard_normal((256, 2048), np.float32).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    """Run, print the table, and end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path, default=EXAMPLE)
    parser.add_argument("--random", action="store_true", help="a layer of a 1B model with Gaussian weights instead")
    parser.add_argument("--folder", type=Path, help="where files are made; by default a temporary folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        work = Path(temporary)
        path = random_checkpoint(work / "random") if arguments.random else arguments.checkpoint
        print("| source | source bits | stored | entropy | saved |\n|---|---:|---:|---:|---:|")
        with Checkpoint.open(path) as original:
            for name in [*FORMATS, *(f"GGUF {kind}" for kind in GGUF_TYPES)]:
                folder = work / "source"
                is_gguf = name.startswith("GGUF ")
                make = write_gguf if is_gguf else write_source
                source = make(original, name.removeprefix("GGUF "), folder)
                if source is not None:
                    row = results[name] = measure(source, work / "out", arguments.threads)
                    saved = 100 * (1 - row["stored_bits"] / row["source_bits"])
                    print(
                        f"| {name} | {row['source_bits']:.3f} | {row['stored_bits']:.3f} | {row['entropy_bits']:.3f} "
                        f"| {saved:.1f} % |",
                        flush=True,
                    )
                for used in (folder, work / "out"):
                    shutil.rmtree(used, ignore_errors=True)
    finish({"model": "random" if arguments.random else str(arguments.checkpoint), "formats": results}, arguments.json)


if __name__ == "__main__":
    main()
