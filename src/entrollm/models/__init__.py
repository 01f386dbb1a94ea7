"""The architectures that the engine runs: each file reads one model_type's config.json into a ModelConfig."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from entrollm.errors import UnsupportedError
from entrollm.models import llama, mistral, phi3, qwen2, qwen3
from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields

ARCHITECTURES: Mapping[str, Callable[[Fields], ModelConfig]] = {
    "llama": llama.read_config,
    "mistral": mistral.read_config,
    "phi3": phi3.read_config,
    "qwen2": qwen2.read_config,
    "qwen3": qwen3.read_config,
}


def read_config(fields: Fields) -> ModelConfig:
    """Read config.json with the architecture that its model_type names.

    Raises:
        FormatError: a value is missing, of the wrong type, out of range or inconsistent with another.
        UnsupportedError: the model type, or an option of it, is not implemented.
    """
    model_type = fields.text("model_type")
    if model_type not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise UnsupportedError(f"{fields.source}: model_type {model_type!r} is not supported; supported: {supported}")
    return ARCHITECTURES[model_type](fields)
