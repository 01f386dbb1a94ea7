"""Small random models of transformers, as checkpoints and as compressed folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from entrollm import CompressOptions, compress

_COMMON: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}


def write_model(folder: Path, config: str = "LlamaConfig", kind: str = "AutoModelForCausalLM", **options: Any) -> Path:
    """A checkpoint with random weights of unit gain, in bfloat16."""
    torch.manual_seed(7)
    made = getattr(transformers, config)(**{**_COMMON, **options})
    model = getattr(transformers, kind).from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(1.2 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="200KB")
    return folder


def write_coded(folder: Path, options: CompressOptions | None = None, **model: Any) -> Path:
    """A compressed folder of such a checkpoint."""
    source = write_model(folder / "source", **model)
    compress(source, folder / "coded", options or CompressOptions(bits=4, shard_bytes=100_000))
    return folder / "coded"


def ids(count: int = 12, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids: int64 (batch, count)."""
    return torch.randint(2, 300, (batch, count), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What a model says, in float32."""
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found.to(torch.float32)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
