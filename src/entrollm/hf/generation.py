"""Fast generation with transformers on a GPU: a static cache, one CUDA graph per token, and no wait between tokens."""

from __future__ import annotations

import copy
import functools
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig
from transformers.generation import utils

from entrollm.hf.attention import shared_keys
from entrollm.hf.speculation import speculate

# Tokens that a cache is made for at least. Calls with caches of one size share compiled code.
_SMALLEST_CACHE = 512

_defers: ContextVar[bool] = ContextVar("defers", default=False)


def compile_config() -> CompileConfig:
    """Options to compile a token's step as `generate` does with a static cache, but without checking every module.

    Before each call of compiled code, torch checks that no layer of the model has changed, which takes some tenths of a
    millisecond. With these options it does not. The model must then not be changed after its first token: a layer that
    is replaced, or moved to another device, may go unnoticed.
    """
    return CompileConfig(
        mode=None,  # type: ignore[arg-type]  # torch takes a mode or options, and these are the options of "reduce-overhead"
        options={
            "triton.cudagraphs": True,
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        },
    )


def generate(model: Any, inputs: Tensor | None = None, **options: Any) -> Any:
    """Call `model.generate` in the way that is fastest on a GPU; its arguments and its result are the same.

    On an NVIDIA GPU it uses, unless the options say otherwise, a static cache for a power of two of tokens, and
    `compile_config`. It also checks whether to stop only after the next token has been started, so that the GPU never
    waits for the CPU. A token too many is dropped, and streamers get each token one step later. With
    prompt_lookup_num_tokens, the tokens of one greedy text come several at a time where its n-grams tell what follows.
    The model may be any model of transformers, coded or not. It must not be changed after the first token, see
    `compile_config`.

    Args:
        model: a model of transformers that can generate.
        inputs: the prompts as token ids (batch, count), unless the options have them.
        options: options of `model.generate`.
    Returns:
        what `model.generate` returns.
    """
    if model.device.type != "cuda":
        return model.generate(inputs, **options)
    if _asked(options).get("prompt_lookup_num_tokens"):
        found = speculate(model, inputs, options)
        return model.generate(inputs, **options) if found is None else found
    token = _defers.set(True)
    try:
        with shared_keys(model):
            return model.generate(inputs, **_with_static_cache(inputs, options))
    finally:
        _defers.reset(token)


def _asked(options: dict[str, Any]) -> dict[str, Any]:
    """The options, with those of their configuration."""
    config = options.get("generation_config")
    given = {} if config is None else {name: value for name, value in vars(config).items() if value is not None}
    return given | options


def _with_static_cache(inputs: Tensor | None, options: dict[str, Any]) -> dict[str, Any]:
    """Add a static cache to the options, unless they choose another cache or none."""
    config = copy.deepcopy(options.get("generation_config"))
    asked = _asked(options)
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
    """Let `generate` defer checks for stopping on CUDA, which transformers 5.23 does on Apple's GPUs alone."""
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
