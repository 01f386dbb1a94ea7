"""Models run by transformers in place of the engine, whose float32 products take too long where a model is not tiny."""

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
    """A model of a checkpoint's configuration whose weights can be replaced, in float32.

    Args:
        checkpoint: the folder of the configuration.
        threads: for products.
    """

    def __init__(self, checkpoint: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        config = AutoConfig.from_pretrained(checkpoint)
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    def set_weights(self, tensors: dict[str, Floats]) -> None:
        """Use other weights: all of them, by their names in the checkpoint."""
        state = {name: torch.from_numpy(np.require(tensor, np.float32, "W")) for name, tensor in tensors.items()}
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        self._model.load_state_dict(state, assign=True)

    def modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """All modules by name."""
        return iter(self._model.named_modules())

    def logits(self, ids: NDArray[np.int64], /) -> Floats:
        """float32 (n, vocabulary)."""
        with torch.inference_mode():
            found: Floats = self._model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
        return found

    def run_body(self, ids: NDArray[np.int64], /) -> None:
        """Run all layers and predict nothing, for the hooks of modules."""
        with torch.inference_mode():
            self._model.model(torch.from_numpy(ids)[None], use_cache=False)


def second_moments(
    checkpoint: Path, tensors: dict[str, Floats], windows: NDArray[np.int64], threads: int
) -> dict[str, Floats]:
    """The mean products of the inputs of the layers' matrices, float32 (columns, columns), by the matrices' names."""
    model = TorchModel(checkpoint, threads)
    model.set_weights(tensors)
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0].flatten(0, -2)
        moments = values.T @ values
        sums[name] = sums[name].add_(moments) if name in sums else moments

    for name, module in model.modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in tensors:
            module.register_forward_pre_hook(lambda _, inputs, name=f"{name}.weight": add(name, inputs))
    run = model.logits if "lm_head.weight" in tensors else model.run_body
    for ids in windows:
        run(ids)
    return {name: (total / windows.size).numpy() for name, total in sums.items()}


def decoded(path: Path) -> dict[str, Any]:
    """The dequantized weights of a compressed folder, in float32."""
    pool = _core.ThreadPool(1)
    with CompressedModel.open(path) as model:
        tensors = {name: model.array(name).astype(np.float32) for name in model.plain}
        for name, spec in model.specs.items():
            tensors[name] = matrix_of(model, name).dequantize(np.arange(spec.rows), pool)
    return tensors
