"""Layers that multiply with coded matrices."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from entrollm.errors import UnsupportedError
from entrollm.torch.joined import Group, Watch, traced_product
from entrollm.torch.weight import CodedStack, CodedWeight


class _Layer(nn.Module):
    """A layer with one coded matrix, which it owns or shares with the layer that owns it."""

    def __init__(self, weight: CodedWeight, owns: bool) -> None:
        super().__init__()
        self.full_spec = weight.spec
        if owns:
            self.weight = weight
        else:
            # Not registered: a tied matrix has one place in the model's state, its moves and its file.
            self.__dict__["weight"] = weight

    @property
    def is_tied(self) -> bool:
        """Whether the matrix belongs to another layer."""
        return "weight" in self.__dict__

    def own_weight(self, weight: CodedWeight) -> None:
        """End the tie: take a matrix of its own."""
        del self.__dict__["weight"]
        self.weight = weight


class EntroLinear(_Layer):
    """A linear layer with a coded matrix.

    Args:
        weight: the matrix, (out_features, in_features).
        bias: (out_features,), or None.
        owns: whether the matrix belongs to this layer; False for one that is tied to another layer's.
    """

    weight: CodedWeight
    bias: nn.Parameter | None
    watch: Watch | None = None
    _shared: tuple[Group, int] | None = None

    def __init__(self, weight: CodedWeight, bias: nn.Parameter | None = None, owns: bool = True) -> None:
        super().__init__(weight, owns)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: (..., in_features) -> (..., out_features) in the type of x."""
        product = traced_product(self.weight, x) if torch.compiler.is_compiling() else self._product(x)
        return product if self.bias is None else product + self.bias

    def _product(self, x: Tensor) -> Tensor:
        watch = self.watch
        if watch is not None:
            watch.note(self, x)
        shared = self._shared
        product: Tensor = self.weight(x) if shared is None else shared[0].product(self.weight, shared[1], x)
        return product

    def share(self, group: Group | None, place: int) -> None:
        """Multiply together with the other layers of a group, in this place; or alone, without a group."""
        self._shared = None if group is None else (group, place)
        self.watch = None

    def extra_repr(self) -> str:
        """What print(model) says of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class EntroEmbedding(_Layer):
    """An embedding with a coded matrix, decoded row by row.

    Args:
        weight: the matrix, (vocabulary, features).
        padding_idx: as in nn.Embedding, which it matters to in training only.
        owns: whether the matrix belongs to this layer; False for one that is tied to another layer's.
    """

    weight: CodedWeight

    def __init__(self, weight: CodedWeight, padding_idx: int | None = None, owns: bool = True) -> None:
        super().__init__(weight, owns)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.first_row = 0
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: integers (...) -> (..., features); zeros for rows that another process holds."""
        rows = self.weight.spec.rows
        if rows == self.num_embeddings:
            return self.weight.rows(ids)
        is_here = (ids >= self.first_row) & (ids < self.first_row + rows)
        found = self.weight.rows(torch.where(is_here, ids - self.first_row, 0))
        return found * is_here[..., None].to(found.dtype)

    def extra_repr(self) -> str:
        """What print(model) says of it."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


def put_weight(model: nn.Module, path: str, weight: CodedWeight | CodedStack, owns: bool = True) -> None:
    """Replace a parameter of a model with coded matrices; its layer becomes an Entro one where there is such a kind.

    A layer of experts then multiplies expert by expert, whatever implementation the configuration names.

    Args:
        model: the model.
        path: the parameter's name, such as `model.layers.0.mlp.up_proj.weight`.
        weight: what takes its place.
        owns: False for a matrix that is tied to another parameter's.
    """
    layer_path, _, attribute = path.rpartition(".")
    layer = model.get_submodule(layer_path)
    if isinstance(weight, CodedWeight) and attribute == "weight" and type(layer) in (nn.Linear, nn.Embedding):
        replacement = _replacement(layer, weight, owns)
        replacement.training = layer.training
        parent_path, _, name = layer_path.rpartition(".")
        setattr(model.get_submodule(parent_path), name, replacement)
        return
    del layer._parameters[attribute]
    if owns:
        layer.add_module(attribute, weight)
    else:
        layer.__dict__[attribute] = weight
    if isinstance(weight, CodedStack) and hasattr(layer, "has_gate"):
        _serve_experts(layer)


def _replacement(layer: nn.Module, weight: CodedWeight, owns: bool) -> EntroLinear | EntroEmbedding:
    if isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            raise UnsupportedError(
                f"{weight.name}: an embedding with max_norm changes its rows, and coded ones are fixed"
            )
        return EntroEmbedding(weight, layer.padding_idx, owns)
    assert isinstance(layer, nn.Linear)
    return EntroLinear(weight, layer.bias, owns)


def _serve_experts(layer: Any) -> None:
    layer.served_experts = range(layer.num_experts)
    # Which experts run depends on the data: compiled, every choice would be compiled anew.
    forward: Any = torch.compiler.disable(_experts_forward)  # type: ignore[no-untyped-call]
    layer.forward = types.MethodType(forward, layer)


def _experts_forward(layer: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The layer's function: each token's output is the weighted sum of those of its experts.

    Args:
        layer: a layer of experts as transformers defines them.
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
        token, place = torch.where(top_k_index == expert)
        state = _product(layer, "gate_up_proj" if layer.has_gate else "up_proj", expert, hidden_states[token])
        state = layer._apply_gate(state) if layer.has_gate else layer.act_fn(state)
        state = _product(layer, "down_proj", expert, state)
        if layer.has_post_expert_norm:
            state = layer.post_expert_norm(state)
        output.index_add_(0, token, (state * top_k_weights[token, place, None]).to(torch.float32))
    return output.to(hidden_states.dtype)


def _product(layer: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(layer, name)
    if layer.is_transposed:
        # Stored as (in_features, out_features): there is no coded product in this direction.
        product: Tensor = x @ weight[expert]
    else:
        is_coded = isinstance(weight, CodedStack)
        product = weight.multiply(expert, x) if is_coded else nn.functional.linear(x, weight[expert])
    return product + getattr(layer, name + "_bias")[expert] if layer.has_bias else product
