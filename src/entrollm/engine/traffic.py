"""What a token reads: the bytes of the weights that it is multiplied with, and of what the tokens before left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from entrollm.checkpoint.names import text_names
from entrollm.engine.cache import cache_bytes_per_token, check_cache_type
from entrollm.engine.layer_cache import CACHE_TYPES
from entrollm.errors import UnsupportedError
from entrollm.models.config import Experts, ModelConfig


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """What a token reads.

    Attributes:
        weight_bytes: of the weights, with as many of a layer's experts as a token runs through.
        all_bytes: of all weights.
        cache_bytes: keys and values of each token before, by the type of the cache, as far as there are such caches.
    """

    weight_bytes: int
    all_bytes: int
    cache_bytes: dict[str, int]


def token_bytes(config: ModelConfig, sizes: Mapping[str, int]) -> TokenBytes:
    """What a token of a model reads.

    Args:
        config: the model's.
        sizes: bytes of its tensors by name. Rows that are looked up count for nothing.
    """
    stored = text_names(sizes, is_tied=config.tied_embeddings)
    by_name = {name: sizes[theirs] for name, theirs in stored.items()}
    head = config.names.head
    looked_up = {config.names.positions} | ({config.names.embedding} if head in stored else set())
    if stored.get(head) == stored.get(config.names.embedding):
        looked_up = {config.names.positions, head}  # one matrix with two names
    if config.layer_inputs is not None:
        looked_up.add(config.layer_inputs.embedding)
    if config.token_head is not None:
        # Only guesses read it.
        place = config.token_head.projection.rpartition(".")[0]
        looked_up |= {name for name in by_name if name.startswith(f"{place}.")}
    total = sum(size for name, size in by_name.items() if name not in looked_up)
    spared = 0.0
    for index, experts in enumerate(config.experts):
        if experts is not None:
            size = sum(by_name.get(name, 0) for name in _expert_names(f"{config.names.layers}{index}.", experts))
            spared += size * (1 - experts.used / experts.count)
    caches: dict[str, int] = {}
    for cache_type in CACHE_TYPES:
        try:
            caches[cache_type] = cache_bytes_per_token(config, check_cache_type(cache_type, config))
        except UnsupportedError:
            continue
    return TokenBytes(round(total - spared), sum(sizes.values()), caches)


def _expert_names(prefix: str, experts: Experts) -> set[str]:
    """The matrices of all experts of a layer, whether each is a tensor or all are one."""
    names = set()
    for form in (experts.expert, experts.stack):
        if form is None:
            continue
        for name in (*form.up, form.down):
            names |= {prefix + name.format(number) + form.suffix for number in range(experts.count)}
            names.add((prefix + name.partition("{}")[0]).rstrip("."))
    return names
