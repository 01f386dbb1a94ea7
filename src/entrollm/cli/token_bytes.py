"""What a token reads of a model, as `info`, `inspect` and `plan` show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entrollm.engine.traffic import TokenBytes


def read_token_bytes(config: Mapping[str, Any], sizes: Mapping[str, int]) -> TokenBytes | None:
    """What a token reads; None for a model that the engine does not run.

    Args:
        config: config.json.
        sizes: bytes of the model's tensors by name.
    """
    from entrollm.engine.traffic import token_bytes
    from entrollm.errors import EntroLLMError
    from entrollm.models import read_config
    from entrollm.models.config_fields import Fields

    try:
        return token_bytes(read_config(Fields(config, "config.json")), sizes)
    except EntroLLMError:
        return None


def describe_token_bytes(found: TokenBytes) -> str:
    """One line."""
    from entrollm.report import format_bytes

    caches = ", ".join(f"{format_bytes(size)} ({name})" for name, size in found.cache_bytes.items())
    return (
        f"{format_bytes(found.weight_bytes)} of {format_bytes(found.all_bytes)} of weights, and keys and values of "
        f"each token before: {caches}"
    )


def token_bytes_to_json(found: TokenBytes | None) -> dict[str, Any] | None:
    """The same for --json."""
    return None if found is None else asdict(found)
