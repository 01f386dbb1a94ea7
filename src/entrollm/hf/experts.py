"""Layers of experts as transformers defines them, run with coded matrices."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from entrollm.torch.cuda.experts import MOST_OUTPUTS
from entrollm.torch.stack import CodedStack


def serve_experts(layer: Any) -> None:
    """Make a layer of experts multiply by coded matrices, whatever implementation the configuration names.

    A few tokens go through all of their experts at once if the kernels for GPUs can do that, which then find the
    experts themselves; other calls go expert by expert. Layers that do not follow transformers' interface for experts
    are left as they are.

    Args:
        layer: a layer that holds a CodedStack.
    """
    if not hasattr(layer, "has_gate"):
        return
    layer.served_experts = range(layer.num_experts)
    layer.runs_together = False
    layer.forward = types.MethodType(_forward, layer)


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
    if not torch.compiler.is_compiling():
        layer.runs_together = _can_run_together(layer, hidden_states.dtype)
    if layer.runs_together and top_k_index.numel() <= MOST_OUTPUTS:
        return _together(layer, hidden_states, top_k_index, top_k_weights)
    output: Tensor = _one_by_one(layer, hidden_states, top_k_index, top_k_weights)
    return output


def _can_run_together(layer: Any, dtype: torch.dtype) -> bool:
    """Whether one launch multiplies by several experts."""
    stacks = [getattr(layer, name) for name in (_first(layer), "down_proj")]
    return layer.served_experts == range(layer.num_experts) and all(
        isinstance(stack, CodedStack) and stack.is_transposed == layer.is_transposed and stack.is_together(dtype)
        for stack in stacks
    )


def _together(layer: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """See _forward; nothing waits for the GPU, so that graphs can be made of it."""
    exists = (top_k_index >= 0) & (top_k_index < layer.num_experts)
    experts = top_k_index.clamp(0, layer.num_experts - 1).reshape(-1)
    state = hidden_states
    for name in (_first(layer), "down_proj"):
        state = getattr(layer, name).multiply_chosen(state, top_k_index)
        if layer.has_bias:
            state = state + getattr(layer, name + "_bias")[experts]
        if name != "down_proj":
            state = _activated(layer, state)
    if layer.has_post_expert_norm:
        state = layer.post_expert_norm(state)
    weighted = (state * top_k_weights.masked_fill(~exists, 0).reshape(-1, 1)).to(torch.float32)
    return weighted.reshape(*top_k_index.shape, weighted.shape[1]).sum(1).to(hidden_states.dtype)


# Which experts run depends on the data: compiled, every choice would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _one_by_one(layer: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """See _forward."""
    output = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for expert in torch.unique(top_k_index).tolist():
        if expert not in layer.served_experts:
            continue
        token, choice = torch.where(top_k_index == expert)
        state = _activated(layer, _product(layer, _first(layer), expert, hidden_states[token]))
        state = _product(layer, "down_proj", expert, state)
        if layer.has_post_expert_norm:
            state = layer.post_expert_norm(state)
        output.index_add_(0, token, (state * top_k_weights[token, choice, None]).to(torch.float32))
    return output.to(hidden_states.dtype)


def _first(layer: Any) -> str:
    """The name of the first weight."""
    return "gate_up_proj" if layer.has_gate else "up_proj"


def _activated(layer: Any, state: Tensor) -> Any:
    return layer._apply_gate(state) if layer.has_gate else layer.act_fn(state)


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
