"""Windows of token ids as what a model of transformers is called with."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from entrollm.calibrate.network import Network
from entrollm.errors import UnsupportedError

# Windows that go through a model together, fewer if their logits would be more numbers than this.
_BATCH_WINDOWS = 8
_LOGITS = 1 << 26


def batches(
    windows: NDArray[np.int64], model: Any, at_most: int | None = None, processes: int = 1
) -> list[NDArray[np.int64]]:
    """Windows, shape (windows, tokens), in batches that go through a model together, of `at_most` windows if given.

    For several processes there are as many for each, and where a single one would have as many, they are the same.
    """
    if not len(windows):
        return []
    size = min(at_most or _BATCH_WINDOWS, _BATCH_WINDOWS, _LOGITS // (windows.shape[1] * max(1, vocabulary(model))))
    rounds = -(-len(windows) // (max(1, size) * processes))
    return np.array_split(windows, min(len(windows), rounds * processes))


def vocabulary(model: Any) -> int:
    """How many tokens a model knows; 0 if its configuration does not say."""
    return int(getattr(model.config.get_text_config(), "vocab_size", 0))


def model_inputs(network: Network, ids: NDArray[np.int64], *, predicts: bool = False) -> dict[str, Any]:
    """The arguments of a model that reads a batch of windows.

    Args:
        network: the model.
        ids: token ids, shape (windows, tokens); an encoder and its decoder both read them.
        predicts: whether all predictions are wanted; else a model may leave most of them out.
    Raises:
        UnsupportedError: the model does not read token ids.
    """
    model = network.model
    if model.main_input_name != "input_ids":
        raise UnsupportedError(
            f"{type(model).__name__} reads {model.main_input_name}; calibration covers models that read text"
        )
    tokens = torch.from_numpy(np.ascontiguousarray(ids)).to(network.place)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    if not predicts and "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    return inputs


def predictions(outputs: Any) -> Tensor:
    """What a model predicts at every position, (windows, tokens, vocabulary), or gives in place of predictions."""
    found: Tensor = outputs["logits"] if "logits" in outputs else outputs[0]
    return found
