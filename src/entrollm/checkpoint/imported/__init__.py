"""Read the integers and scales of quantized checkpoints; one module for each format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entrollm.checkpoint.imported import (
    autoround,
    awq,
    bitsandbytes,
    compressed_tensors,
    float4_layers,
    gguf,
    gptq,
    hqq,
    mxfp4,
)
from entrollm.checkpoint.imported.formats import Format, ImportedMatrix, ImportedWeights, RawTensors
from entrollm.checkpoint.imported.fp8 import fp8_matrix

__all__ = ["FORMATS", "Format", "ImportedMatrix", "ImportedWeights", "RawTensors", "find_format", "fp8_matrix"]

FORMATS: Mapping[str, Format] = {
    "GPTQ": gptq,
    "AWQ": awq,
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": bitsandbytes,
    "HQQ": hqq,
    "AutoRound": autoround,
    "4-bit floats": float4_layers,
    "MXFP4": mxfp4,
    "GGUF": gguf,
}


def find_format(quantization: Mapping[str, Any]) -> str | None:
    """The name in FORMATS of the format of a quantization_config; None if it is unknown."""
    return next((name for name, module in FORMATS.items() if module.recognise(quantization)), None)
