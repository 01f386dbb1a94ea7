"""How transformers compiles the step that makes a token."""

from __future__ import annotations

import torch
from transformers import CompileConfig


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
