"""Models run by transformers in place of the engine, whose float32 products take too long where a model is not tiny.

PyTorch rounds the inputs of products to bfloat16 where the processor multiplies those faster, and adds up in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from entrollm import _core
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of

Floats = NDArray[np.float32]


class TorchModel:
    """A model of a checkpoint's configuration with other weights.

    Args:
        checkpoint: the folder of the configuration.
        tensors: all weights, by their names in the checkpoint.
        threads: for products.
    """

    def __init__(self, checkpoint: Path, tensors: dict[str, Floats], threads: int) -> None:
        torch.set_num_threads(threads)
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        config = AutoConfig.from_pretrained(checkpoint)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        rotation = type(model.model.rotary_emb)(config)
        state = {name: torch.from_numpy(np.require(tensor, np.float32, "W")) for name, tensor in tensors.items()}
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        model.load_state_dict(state, assign=True)
        model.model.rotary_emb = rotation  # its frequencies are in no checkpoint
        self._model = model.eval()

    def modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """All modules by name."""
        return iter(self._model.named_modules())

    def logits(self, ids: NDArray[np.int64], /) -> Floats:
        """float32 (n, vocabulary)."""
        with torch.inference_mode():
            found: Floats = self._model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
        return found


def mean_squares(
    checkpoint: Path, tensors: dict[str, Floats], windows: NDArray[np.int64], threads: int
) -> dict[str, Floats]:
    """The mean squares of the inputs of linear layers, float32 (columns,), by the names of their weights."""
    model = TorchModel(checkpoint, tensors, threads)
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        squares = inputs[0].flatten(0, -2).double().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    for name, module in model.modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in tensors:
            module.register_forward_pre_hook(lambda _, inputs, name=f"{name}.weight": add(name, inputs))
    for ids in windows:
        model.logits(ids)
    return {name: (total / windows.size).float().numpy() for name, total in sums.items()}


def decoded(path: Path) -> dict[str, Any]:
    """The dequantized weights of a compressed folder, in float32."""
    pool = _core.ThreadPool(1)
    with CompressedModel.open(path) as model:
        tensors = {name: model.array(name).astype(np.float32) for name in model.plain}
        for name, spec in model.specs.items():
            tensors[name] = matrix_of(model, name).dequantize(np.arange(spec.rows), pool)
    return tensors
