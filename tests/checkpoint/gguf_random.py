"""Small GGUF files with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.checkpoint.test_gguf_metadata import whole
from tests.support.gguf_sources import GgufSource

_BY_TOKEN = ("token_embd.weight", "output.weight", "output.bias", "per_layer_token_embd.weight")


def random_model(values: dict[str, Any], rows: int, architecture: str = "llama") -> GgufSource:
    """The small model with an embedding of so many rows and weights that are not all alike."""
    made = whole(architecture, {**values, "tokenizer.ggml.add_bos_token": values.get("tokenizer.ggml.add_bos_token")})
    generator = np.random.default_rng(3)
    tensors = []
    for name, shape, kind, content in made.tensors:
        if name == "rope_freqs.weight":
            tensors.append((name, shape, kind, content))
            continue
        shape = (rows, *shape[1:]) if name in _BY_TOKEN else shape
        array = 0.2 * generator.standard_normal(shape)
        if "norm" in name:
            # Attention of Gemma 4 has no other scale, and sharp attention enlarges the rounding of keys.
            array = (0.2 if architecture == "gemma4" and "attn_q_norm" in name else 1) * (1 + array / 2)
        tensors.append((name, shape, 0, array.astype(np.float32).tobytes()))
    return GgufSource(made.values, tensors)
