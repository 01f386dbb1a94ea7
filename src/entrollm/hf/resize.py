"""Changing the number of tokens of a model, which coded embeddings do not allow."""

from __future__ import annotations

import math
import types
from typing import Any

from transformers import PreTrainedModel

from entrollm.errors import Message, Option, OptionError
from entrollm.torch.weight import CodedWeight


def refuse_resizing(model: Any) -> None:
    """Make a model, and the models inside it, refuse to resize coded embeddings, in place of failing half way."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            inner: Any = module
            inner.resize_token_embeddings = types.MethodType(_resize_token_embeddings, module)


def _resize_token_embeddings(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **options: Any
) -> Any:
    """Do what the method of transformers does, if no coded matrix would change.

    Raises:
        OptionError: the embedding or the output head is coded and has another number of rows.
    """
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    coded = {layer.weight.name: layer.weight.shape[0] for layer in layers if isinstance(layer.weight, CodedWeight)}
    wanted = layers[0].weight.shape[0] if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        wanted = math.ceil(wanted / pad_to_multiple_of) * pad_to_multiple_of
    if fixed := [name for name, rows in coded.items() if rows != wanted]:
        raise OptionError(
            f"{fixed[0]} is coded with {coded[fixed[0]]} rows and cannot be resized to {wanted}",
            hint=Message("keep it in its type with {} when you compress", Option("keep", fixed)),
        )
    if coded:
        return layers[0]
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, **options)
