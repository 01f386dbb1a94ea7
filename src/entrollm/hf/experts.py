"""Layers of experts as transformers defines them, run expert by expert with coded matrices."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from entrollm.torch.stack import CodedStack


def serve_experts(layer: Any) -> None:
    """Make a layer of experts multiply expert by expert, whatever implementation the configuration names.

    Layers that do not follow transformers' interface for experts are left as they are.

    Args:
        layer: a layer that holds a CodedStack.
    """
    if not hasattr(layer, "has_gate"):
        return
    layer.served_experts = range(layer.num_experts)
    # Which experts run depends on the data: compiled, every choice would be compiled anew.
    forward: Any = torch.compiler.disable(_forward)  # type: ignore[no-untyped-call]
    layer.forward = types.MethodType(forward, layer)


def _forward(layer: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Add up the weighted outputs of each token's experts.

    Args:
        layer: the layer.
        hidden_states: (tokens, hidden_size).
        top_k_index, top_k_weights: (tokens, experts of each); an index beyond the experts means none. Experts that
            another process serves are left out.
    Returns:
        (tokens, hidden_size) in the type of hidden_states.
    """
    output = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for expert in torch.unique(top_k_index).tolist():
        if expert not in layer.served_experts:
            continue
        token, choice = torch.where(top_k_index == expert)
        state = _product(layer, "gate_up_proj" if layer.has_gate else "up_proj", expert, hidden_states[token])
        state = layer._apply_gate(state) if layer.has_gate else layer.act_fn(state)
        state = _product(layer, "down_proj", expert, state)
        if layer.has_post_expert_norm:
            state = layer.post_expert_norm(state)
        output.index_add_(0, token, (state * top_k_weights[token, choice, None]).to(torch.float32))
    return output.to(hidden_states.dtype)


def _product(layer: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(layer, name)
    if isinstance(weight, CodedStack) and weight.is_transposed == layer.is_transposed:
        product = weight.multiply(expert, x)
    elif layer.is_transposed:
        # Stored as (in_features, out_features): there is no coded product in this direction.
        product = x @ weight[expert]
    else:
        product = nn.functional.linear(x, weight[expert])
    return product + getattr(layer, name + "_bias")[expert] if layer.has_bias else product
