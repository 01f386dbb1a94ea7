"""Read Hugging Face checkpoints: one tensor or a range of rows at a time, never the whole model."""

from entrollm.checkpoint.gguf_tokenizer import convert_tokenizer
from entrollm.checkpoint.model_folder import Checkpoint, TensorInfo, is_gguf, side_files
from entrollm.checkpoint.quantized import PackedMatrix
from entrollm.checkpoint.resolve import resolve
from entrollm.checkpoint.safetensors_file import DTYPES, Entry, SafetensorsFile, open_safetensors
from entrollm.checkpoint.scales import to_float32

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
