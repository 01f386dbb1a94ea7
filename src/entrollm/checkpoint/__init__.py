"""Read Hugging Face checkpoints: one tensor or a range of rows at a time, never the whole model.

What runs a compressed model imports this package too: the parts that read checkpoints are imported when they are first
used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from entrollm.checkpoint.resolve import resolve
from entrollm.checkpoint.safetensors_file import DTYPES, Entry, SafetensorsFile, open_safetensors
from entrollm.checkpoint.scales import to_float32
from entrollm.checkpoint.weight_files import is_gguf

if TYPE_CHECKING:
    from entrollm.checkpoint.gguf_tokenizer import convert_tokenizer
    from entrollm.checkpoint.model_folder import Checkpoint, TensorInfo, side_files
    from entrollm.checkpoint.quantized import PackedMatrix

__all__ = [
    "DTYPES",
    "Checkpoint",
    "Entry",
    "PackedMatrix",
    "SafetensorsFile",
    "TensorInfo",
    "convert_tokenizer",
    "is_gguf",
    "open_safetensors",
    "resolve",
    "side_files",
    "to_float32",
]

_HOMES = {
    "Checkpoint": "model_folder",
    "PackedMatrix": "quantized",
    "TensorInfo": "model_folder",
    "convert_tokenizer": "gguf_tokenizer",
    "side_files": "model_folder",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
