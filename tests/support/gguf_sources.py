"""GGUF files written byte by byte, and blocks of weights packed one at a time as ggml lays them out."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.quantized_sources import CONFIG, HIDDEN, LINEARS, VOCABULARY, plain_tensors

F32 = np.float32
TYPE_NUMBERS = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
}  # fmt: skip
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# By type: the weights of a block, and a function from a generator to its bytes and its weights.
Packed = tuple[bytes, list[np.float32]]


def _half(generator: np.random.Generator, low: float, high: float) -> np.float16:
    return np.float16(generator.uniform(low, high))


def _small(bits: int, has_minimum: bool) -> Callable[[np.random.Generator], Packed]:
    """32 weights of 4 or 5 bits: nibble i and i + 16 share a byte."""

    def pack(generator: np.random.Generator) -> Packed:
        scale, minimum = _half(generator, 0.004, 0.012), _half(generator, -0.1, -0.05)
        integers = generator.integers(0, 2**bits, 32).tolist()
        head = scale.tobytes() + (minimum.tobytes() if has_minimum else b"")
        if bits == 5:
            head += struct.pack("<I", sum((value >> 4) << i for i, value in enumerate(integers)))
        body = bytes(integers[i] & 15 | (integers[i + 16] & 15) << 4 for i in range(16))
        if has_minimum:
            return head + body, [F32(F32(value) * F32(scale)) + F32(minimum) for value in integers]
        return head + body, [F32(value - 2 ** (bits - 1)) * F32(scale) for value in integers]

    return pack


def _q8_0(generator: np.random.Generator) -> Packed:
    scale = _half(generator, 0.0005, 0.001)
    integers = generator.integers(-128, 128, 32).tolist()
    return scale.tobytes() + struct.pack("<32b", *integers), [F32(value) * F32(scale) for value in integers]


def _k(bits: int) -> Callable[[np.random.Generator], Packed]:
    """256 weights of 4 or 5 bits in eight groups."""

    def pack(generator: np.random.Generator) -> Packed:
        outer, outer_minimum = _half(generator, 0.0001, 0.0003), _half(generator, 0.001, 0.003)
        scales, minimums = generator.integers(0, 64, 8).tolist(), generator.integers(0, 64, 8).tolist()
        packed = bytearray(12)
        for group in range(8):
            if group < 4:
                packed[group] |= scales[group]
                packed[group + 4] |= minimums[group]
            else:
                packed[group + 4] = scales[group] & 15 | (minimums[group] & 15) << 4
                packed[group - 4] |= scales[group] >> 4 << 6
                packed[group] |= minimums[group] >> 4 << 6
        integers = generator.integers(0, 2**bits, 256).tolist()
        fifth, nibbles = bytearray(32), bytearray(128)
        for i, value in enumerate(integers):
            group, place = divmod(i, 32)
            fifth[place] |= (value >> 4) << group
            nibbles[group // 2 * 32 + place] |= (value & 15) << (4 if group % 2 else 0)
        weights = []
        for i, value in enumerate(integers):
            scale, minimum = F32(outer) * F32(scales[i // 32]), F32(outer_minimum) * F32(minimums[i // 32])
            weights.append(F32(scale * F32(value)) - minimum)
        high = bytes(fifth) if bits == 5 else b""
        return outer.tobytes() + outer_minimum.tobytes() + bytes(packed) + high + bytes(nibbles), weights

    return pack


def _q6_k(generator: np.random.Generator) -> Packed:
    outer = _half(generator, 0.00005, 0.0001)
    scales = generator.integers(-128, 128, 16).tolist()
    integers = generator.integers(0, 64, 256).tolist()
    low, high = bytearray(128), bytearray(64)
    for i, value in enumerate(integers):
        half, rest = divmod(i, 128)
        run, place = divmod(rest, 32)
        low[half * 64 + run % 2 * 32 + place] |= (value & 15) << (4 * (run // 2))
        high[half * 32 + place] |= (value >> 4) << (2 * run)
    weights = [F32(F32(outer) * F32(scales[i // 16])) * F32(value - 32) for i, value in enumerate(integers)]
    return bytes(low) + bytes(high) + struct.pack("<16b", *scales) + outer.tobytes(), weights


BLOCKS: dict[str, tuple[int, Callable[[np.random.Generator], Packed]]] = {
    "Q4_0": (32, _small(4, False)),
    "Q4_1": (32, _small(4, True)),
    "Q5_0": (32, _small(5, False)),
    "Q5_1": (32, _small(5, True)),
    "Q8_0": (32, _q8_0),
    "Q4_K": (256, _k(4)),
    "Q5_K": (256, _k(5)),
    "Q6_K": (256, _q6_k),
}


@dataclass
class GgufSource:
    """What a GGUF file is made of; tensors are (name, shape with rows first, type number, bytes)."""

    values: dict[str, Any]
    tensors: list[tuple[str, tuple[int, ...], int, bytes]] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """The file."""
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.values))
        for key, value in self.values.items():
            head += text(key) + encode_value(value)
        data = b""
        for name, shape, kind, content in self.tensors:
            head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
            head += struct.pack("<IQ", kind, len(data))
            data += content + bytes(-len(content) % 32)
        return head + bytes(-len(head) % 32) + data


@lru_cache(maxsize=4096)
def text(value: str) -> bytes:
    """A string with its length."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def encode_value(value: Any) -> bytes:
    """A value with its type."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if value >= 0 else struct.pack("<Ii", 5, value)
    if isinstance(value, float):
        is_wide = float(np.finfo(np.float32).max) < abs(value) < np.inf
        return struct.pack("<Id", 12, value) if is_wide else struct.pack("<If", 6, value)
    if value and isinstance(value[0], (int, float)):
        kind, code = {bool: (7, "?"), int: (5, "i"), float: (6, "f")}[type(value[0])]
        return struct.pack("<IIQ", 9, kind, len(value)) + struct.pack(f"<{len(value)}{code}", *value)
    items = b"".join(text(item) for item in value)
    return struct.pack("<IIQ", 9, 8, len(value)) + items


def llama_values() -> dict[str, Any]:
    """The metadata of the model of `quantized_sources`."""
    return {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": CONFIG["intermediate_size"],
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 128,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "strange",
        "tokenizer.ggml.merges": ["t1 1"],
        "tokenizer.ggml.tokens": [*(f"t{i}" for i in range(VOCABULARY - 1)), "1"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }


def file_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def write_gguf(path: Path, kind: str, values: Mapping[str, Any] | None = None) -> dict[str, NDArray[np.float32]]:
    """Write the small Llama with linear layers of a type (Q8_0 where rows are too short); returns their weights."""
    generator = np.random.default_rng(5)
    source = GgufSource(llama_values() | dict(values or {}))
    for name, array in plain_tensors(generator).items():
        array = array.astype(np.float32 if array.ndim == 1 else np.float16)
        source.tensors.append((file_name(name), array.shape, 0 if array.ndim == 1 else 1, array.tobytes()))
    expected = {}
    for name, (rows, columns) in LINEARS.items():
        used = kind if columns % BLOCKS[kind][0] == 0 else "Q8_0"
        size, pack = BLOCKS[used]
        packed = [[pack(generator) for _ in range(columns // size)] for _ in range(rows)]
        expected[name + ".weight"] = np.array([[w for block in row for w in block[1]] for row in packed], np.float32)
        # The file has rows 0 and d / 2 of a head, then 1 and d / 2 + 1, ...
        order = range(rows)
        if name.endswith(("q_proj", "k_proj")):
            order = [h * 32 + i // 2 + i % 2 * 16 for h in range(rows // 32) for i in range(32)]
        content = b"".join(block[0] for i in order for block in packed[i])
        source.tensors.append((file_name(name + ".weight"), (rows, columns), TYPE_NUMBERS[used], content))
    path.write_bytes(source.to_bytes())
    return expected


def tiny_gguf(values: Mapping[str, Any] | None = None) -> GgufSource:
    """A file of two small tensors, to damage."""
    source = GgufSource({"general.architecture": "llama", "a.list": ["x", "yz"], "a.number": 7} | dict(values or {}))
    source.tensors.append(("token_embd.weight", (2, 32), TYPE_NUMBERS["Q8_0"], bytes(68)))
    source.tensors.append(("output_norm.weight", (3,), 0, np.ones(3, np.float32).tobytes()))
    return source
