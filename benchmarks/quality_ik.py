"""The types of ik_llama.cpp as peers of quality: its own program quantizes, its own library dequantizes.

The package `ik-llama-cpp-python` has both. Python's `gguf` does not know these types, so the library reads the files.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from entrollm.models.config import ModelConfig
from quality_peers import LlamaCpp, Peer, Tensors, gguf_name, restored, shares, write_gguf

TYPES = ("IQ5_K", "IQ4_K", "IQ3_K", "IQ2_K", "IQ4_KT", "IQ3_KT", "IQ2_KT")
# The program refuses these without an importance matrix.
_WITH_IMPORTANCE = {"IQ2_KT"}
_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


def ik_peers(tensors: Tensors, config: ModelConfig, folder: Path, given: LlamaCpp) -> Iterator[Peer]:
    """ik_llama.cpp's quantizer on the model; sizes are those of the GGUF files."""
    spec = find_spec("ik_llama_cpp")
    if spec is None or spec.origin is None:
        raise ValueError("the peers ik and ik-imatrix need the package ik-llama-cpp-python")
    package = Path(spec.origin).parent
    library = _Library(package / "lib" / "libggml.so")
    source, squares = folder / "ik-f32.gguf", folder / "ik.imatrix"
    write_gguf(tensors, config, source, given)
    options = [] if given.importance is None else ["--imatrix", str(squares)]
    if given.importance is not None:
        rows = {name: given.rows(tensors[name].shape) for name in given.importance}
        importance = {gguf_name(name, config): np.tile(given.importance[name], rows[name]) for name in rows}
        _write_importance(importance, squares)
    weights = sum(tensor.size for tensor in tensors.values())
    for kind in given.kinds:
        if given.importance is None and kind in _WITH_IMPORTANCE:
            continue
        target = folder / f"ik-{kind}.gguf"
        program = package / "bin" / "llama-quantize"
        command = [str(program), *options, str(source), str(target), kind, str(os.cpu_count() or 1)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"ik_llama.cpp cannot quantize to {kind}: {(done.stdout + done.stderr)[-1000:]}")
        made, types = _read(library, target, tensors, config, given)
        peer = kind + given.title, f"ik_llama.cpp{given.title}"
        yield Peer(*peer, made, target.stat().st_size * 8 / weights, shares(types))
        target.unlink()


def _write_importance(importance: Tensors, path: Path) -> None:
    """Mean squares of inputs in the form of llama.cpp's imatrix files, as if from one call."""
    parts = [struct.pack("<i", len(importance))]
    for name, values in importance.items():
        stored = name.encode()
        parts += [struct.pack("<i", len(stored)), stored, struct.pack("<ii", 1, values.size), values.tobytes()]
    path.write_bytes(b"".join(parts))


class _FileOptions(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


class _MemoryOptions(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Traits(ctypes.Structure):
    """What the library knows of a type; `ggml_type_traits_t` in its ggml.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block_weights", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
        ("from_float", ctypes.c_void_p * 4),
        ("dot_type", ctypes.c_int),
        ("rest", ctypes.c_int64 * 5),
    )


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file: its type, and the byte at which it begins."""

    type: int
    begin: int


class _Library:
    """Calls into ik_llama.cpp's libggml."""

    def __init__(self, path: Path) -> None:
        self._ggml = ctypes.CDLL(str(path))
        signatures = {
            "ggml_init": (ctypes.c_void_p, _MemoryOptions),
            "ggml_internal_get_type_traits": (_Traits, ctypes.c_int),
            "ggml_row_size": (ctypes.c_size_t, ctypes.c_int, ctypes.c_int64),
            "gguf_init_from_file": (ctypes.c_void_p, ctypes.c_char_p, _FileOptions),
            "gguf_free": (None, ctypes.c_void_p),
            "gguf_get_n_tensors": (ctypes.c_int, ctypes.c_void_p),
            "gguf_get_data_offset": (ctypes.c_size_t, ctypes.c_void_p),
            "gguf_get_tensor_name": (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int),
            "gguf_get_tensor_type": (ctypes.c_int, ctypes.c_void_p, ctypes.c_int),
            "gguf_get_tensor_offset": (ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int),
        }
        for name, (result, *arguments) in signatures.items():
            function = getattr(self._ggml, name)
            function.restype, function.argtypes = result, arguments
        # Fills the library's tables of numbers.
        self._ggml.ggml_init(_MemoryOptions(1 << 20, None, True))

    def tensors(self, path: Path) -> dict[str, _Stored]:
        """The tensors of a GGUF file by name."""
        ggml = self._ggml
        opened = ggml.gguf_init_from_file(str(path).encode(), _FileOptions(True, None))
        if not opened:
            raise ValueError(f"ik_llama.cpp cannot open {path}")
        data = ggml.gguf_get_data_offset(opened)
        found = {
            ggml.gguf_get_tensor_name(opened, i).decode(): _Stored(
                ggml.gguf_get_tensor_type(opened, i), data + ggml.gguf_get_tensor_offset(opened, i)
            )
            for i in range(ggml.gguf_get_n_tensors(opened))
        }
        ggml.gguf_free(opened)
        return found

    def name(self, type_: int) -> str:
        """The name of a type."""
        return str(self._ggml.ggml_internal_get_type_traits(type_).name.decode())

    def dequantized(self, path: Path, stored: _Stored, rows: int, columns: int) -> np.ndarray:
        """float32 (rows, columns); the scale of a row may stand before its blocks, so rows are read one by one."""
        if self.name(stored.type) == "f32":
            return np.fromfile(path, np.float32, rows * columns, offset=stored.begin).reshape(rows, columns)
        row_bytes = self._ggml.ggml_row_size(stored.type, columns)
        coded = np.fromfile(path, np.uint8, rows * row_bytes, offset=stored.begin).reshape(rows, row_bytes)
        to_float = self._ggml.ggml_internal_get_type_traits(stored.type).to_float
        values = np.empty((rows, columns), np.float32)
        for source, target in zip(coded, values, strict=True):
            to_float(source.ctypes.data, target.ctypes.data, columns)
        return values


def _read(
    library: _Library, path: Path, originals: Tensors, config: ModelConfig, given: LlamaCpp
) -> tuple[Tensors, dict[str, int]]:
    """The weights under their names in the checkpoint, and how many of them have each type."""
    stored = library.tensors(path)
    found: Tensors = {}
    types: dict[str, int] = {}
    for name, tensor in originals.items():
        entry = stored[gguf_name(name, config)]
        columns = tensor.shape[-1] * given.rows(tensor.shape)
        values = library.dequantized(path, entry, math.prod(tensor.shape) // columns, columns)
        found[name] = restored(values, name, tensor.shape, config)
        kind = library.name(entry.type).upper()
        types[kind] = types.get(kind, 0) + tensor.size
    return found, types
