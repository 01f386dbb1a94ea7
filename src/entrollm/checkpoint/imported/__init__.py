"""Read checkpoints that are quantized already: their integers and scales, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entrollm.checkpoint.imported import awq, bitsandbytes, compressed_tensors, gguf, gptq, hqq
from entrollm.checkpoint.imported.fp8 import fp8_matrix
from entrollm.checkpoint.imported.packed import Format, PackedMatrix, RawTensors, StoredMatrix

__all__ = ["FORMATS", "Format", "PackedMatrix", "RawTensors", "StoredMatrix", "find_format", "fp8_matrix"]

FORMATS: Mapping[str, Format] = {
    "GPTQ": gptq,
    "AWQ": awq,
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": bitsandbytes,
    "HQQ": hqq,
    "GGUF": gguf,
}


def find_format(quantization: Mapping[str, Any]) -> str | None:
    """The name in FORMATS of the format that a quantization_config tells of; None for an unknown one."""
    return next((name for name, module in FORMATS.items() if module.recognise(quantization)), None)
