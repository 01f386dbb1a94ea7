"""Generation with transformers as fast as a GPU goes: a static cache, one CUDA graph a token, and no waiting for it."""

from __future__ import annotations

import copy
import functools
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig
from transformers.generation import utils

# Caches are made for at least so many tokens: calls within one size share what is compiled.
_SMALLEST_CACHE = 512

_defers: ContextVar[bool] = ContextVar("defers", default=False)


def compile_config() -> CompileConfig:
    """CUDA graphs, as `generate` compiles by itself with a static cache, but without a look at every module per token.

    torch checks before each compiled call that no layer of the model has changed since, which takes the processor some
    tenths of a millisecond. With this, a model must not be changed after its first token: layers that are replaced, or
    moved to another device, may go unnoticed.
    """
    return CompileConfig(
        mode=None,  # type: ignore[arg-type]  # torch takes a mode or options; these are those of "reduce-overhead"
        options={
            "triton.cudagraphs": True,
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        },
    )


def generate(model: Any, inputs: Tensor | None = None, **options: Any) -> Any:
    """Call `model.generate` with what makes tokens come fast on a GPU; what it takes and gives is the same.

    On an NVIDIA GPU, unless the options say otherwise: a static cache, for a power of two of tokens; `compile_config`;
    and whether to stop is only asked when the next token is under way already, so that the GPU never waits for the
    processor. A token that comes too much is dropped, and streamers get tokens one later. Any model of transformers
    will do, coded or not; it must not be changed after the first token, see `compile_config`.

    Args:
        model: a model of transformers that generates.
        inputs: the prompts as token ids (batch, count), unless among the options.
        options: of `model.generate`.
    """
    if model.device.type != "cuda":
        return model.generate(inputs, **options)
    token = _defers.set(True)
    try:
        return model.generate(inputs, **_with_static_cache(inputs, options))
    finally:
        _defers.reset(token)


def _with_static_cache(inputs: Tensor | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options with a static cache, unless they choose another or none."""
    config = copy.deepcopy(options.get("generation_config"))
    asked = (
        {} if config is None else {name: value for name, value in vars(config).items() if value is not None}
    ) | options
    if not asked.get("use_cache", True) or {"past_key_values", "cache_implementation"} & asked.keys():
        return options
    chosen: dict[str, Any] = {"cache_implementation": "static"}
    chosen["compile_config"] = asked.get("compile_config", compile_config())
    tokens = options.get("input_ids") if inputs is None else inputs
    if "max_cache_len" in asked:
        chosen["max_cache_len"] = asked["max_cache_len"]
    elif "max_new_tokens" in asked and tokens is not None:
        total = max(_SMALLEST_CACHE, tokens.shape[-1] + asked["max_new_tokens"])
        chosen["max_cache_len"] = 1 << (total - 1).bit_length()
    if config is None:
        return options | chosen
    config.update(**chosen)
    return options | {"generation_config": config}


def _let_generate_defer() -> None:
    """Let `generate` have transformers' deferred checks of stopping on CUDA; 5.23 makes them on Apple's GPUs alone."""
    check = getattr(utils, "DeferredStopCheck", None)
    if check is None:
        return
    supported = check.is_supported

    @functools.wraps(supported)
    def is_supported(device: torch.device, *arguments: Any, **options: Any) -> bool:
        if _defers.get() and device.type == "cuda":
            device = torch.device("mps")
        found: bool = supported(device, *arguments, **options)
        return found

    check.is_supported = staticmethod(is_supported)


_let_generate_defer()
