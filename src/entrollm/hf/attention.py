"""Attention of a few tokens whose query heads share keys and values, without copies of these for every head."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "entrollm_sdpa"
# Queries of guesses and of single tokens. Prompts are left to transformers, which may then leave out the mask.
_MOST_TOKENS = 16
_HOPPER = (9, 0)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Do what transformers' "sdpa" does, which copies keys and values for every head if there is a mask.

    From Hopper on, cuDNN shares them, and does that faster than if the heads that share them become the queries of one
    head, which takes any kernel.
    """
    batch, heads, tokens, size = query.shape
    shared = key.shape[1]
    is_plain = not options.get("dropout") and options.get("position_bias") is None and options.get("softcap") is None
    is_masked = attention_mask is not None and attention_mask.shape[1] == 1
    attend = functools.partial(functional.scaled_dot_product_attention, scale=options.get("scaling"))
    if shared < heads and is_masked and is_plain and tokens <= _MOST_TOKENS and _cudnn_shares(query):
        output = attend(query, key, value, attn_mask=attention_mask, enable_gqa=True)
    elif shared < heads and is_masked and is_plain and tokens == 1:
        packed = query.reshape(batch, shared, heads // shared, size)
        output = attend(packed, key, value, attn_mask=attention_mask).reshape(batch, heads, 1, -1)
    else:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    return output.transpose(1, 2).contiguous(), None


def _cudnn_shares(query: Tensor) -> bool:
    """Whether cuDNN attends with heads that share keys and values, and is the fastest that does."""
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) < _HOPPER:
        return False
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 128 and query.shape[-1] % 8 == 0


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def shared_keys(model: Any) -> Iterator[None]:
    """Let a model of transformers that uses its "sdpa" attention share keys and values during the block."""
    takes_names = getattr(model, "_supports_attention_backend", False)
    if not takes_names or model.config._attn_implementation != "sdpa":
        yield
        return
    before = _implementations(model.config)
    model.set_attn_implementation(_shared(before))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _implementations(config: Any) -> dict[str, Any]:
    """The implementations of a configuration and of those in it, as set_attn_implementation takes them."""
    parts = ((name, getattr(config, name)) for name in config.sub_configs)
    inner = {name: _implementations(part) for name, part in parts if part is not None}
    return {"": config._attn_implementation, **inner}


def _shared(implementations: dict[str, Any]) -> dict[str, Any]:
    """The same with this attention in the place of "sdpa"; others, such as of an encoder of images, stay."""
    return {
        name: _shared(each) if isinstance(each, dict) else _NAME if each == "sdpa" else each
        for name, each in implementations.items()
    }
