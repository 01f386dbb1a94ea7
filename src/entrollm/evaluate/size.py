"""The size of a model's weight files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.resolve import resolve
from entrollm.files.shards import is_gguf
from entrollm.format.reader import CompressedModel, is_compressed, read_config


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The weight files of a model, everything in them included.

    Attributes:
        file_bytes: size of all weight files.
        weights: how many weights the whole model has, norms and biases included.
        method: how it was quantized, such as "ecsq"; `None` if config.json does not say.
    """

    file_bytes: int
    weights: int
    method: str | None

    @property
    def file_bits(self) -> float:
        """Bits per weight."""
        return self.file_bytes * 8 / max(1, self.weights)


def model_size(model: str | Path) -> ModelSize:
    """Measure a model folder, compressed or not, or a GGUF file.

    Raises:
        FormatError: the folder is malformed.
        ValueError: it is neither a folder nor a Hub id.
    """
    path = resolve(model)
    config = {} if is_gguf(path) else read_config(path)
    if not is_compressed(config):
        with Checkpoint.open(path) as checkpoint:
            weights = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
            return ModelSize(checkpoint.file_bytes(), weights, checkpoint.quantization)
    with CompressedModel.open(path, check=False) as opened:
        weights = sum(spec.rows * spec.columns for spec in opened.specs.values())
        weights += sum(opened.array(name).size for name in opened.plain)
        quantization = config["quantization_config"]
        method = quantization.get("source") or quantization.get("method")
        return ModelSize(opened.file_bytes(), weights, method if isinstance(method, str) else None)
