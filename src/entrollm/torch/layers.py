"""Layers that multiply with coded matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from entrollm.errors import UnsupportedError
from entrollm.torch.joined_layers import JoinedLayers, Layer, ReadyProducts, Watch, compiled_product
from entrollm.torch.stack import CodedStack
from entrollm.torch.weight import CodedWeight


class _CodedLayer(nn.Module):
    """A layer with one coded matrix, which it owns or shares with the layer that owns it."""

    weight: CodedWeight

    def __init__(self, weight: CodedWeight, owns: bool) -> None:
        super().__init__()
        self.full_spec = weight.spec
        if owns:
            self.weight = weight
        else:
            # Not registered as a child: a tied matrix appears once in the model's state, its moves and its file.
            self.__dict__["weight"] = weight

    @property
    def is_tied(self) -> bool:
        """Whether the matrix belongs to another layer."""
        return "weight" in self.__dict__

    def own_weight(self, weight: CodedWeight) -> None:
        """End the tie: take a matrix of its own."""
        del self.__dict__["weight"]
        self.weight = weight


class EntroLinear(_CodedLayer):
    """A linear layer with a coded matrix.

    Args:
        weight: the matrix, (out_features, in_features).
        bias: (out_features,), or `None` if absent.
        owns: whether the matrix belongs to this layer; False if it is tied to another layer's.
    """

    bias: nn.Parameter | None
    joining: Watch | JoinedLayers | None = None

    def __init__(self, weight: CodedWeight, bias: nn.Parameter | None = None, owns: bool = True) -> None:
        super().__init__(weight, owns)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: (..., in_features) -> (..., out_features) in the type of x."""
        product: Tensor
        if torch.compiler.is_compiling():
            product = compiled_product(self.weight, x)
        elif self.joining is None:
            product = self.weight(x)
        else:
            product = self.joining.product(self, x)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """What print(model) says about it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class EntroEmbedding(_CodedLayer):
    """An embedding with a coded matrix, decoded row by row.

    Args:
        weight: the matrix, (vocabulary, features).
        padding_idx: as in nn.Embedding, where it matters in training only.
        owns: whether the matrix belongs to this layer; False if it is tied to another layer's.
    """

    def __init__(self, weight: CodedWeight, padding_idx: int | None = None, owns: bool = True) -> None:
        super().__init__(weight, owns)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.first_row = 0
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows: integers (...) -> (..., features); zeros for rows that another process holds."""
        rows = self.weight.spec.rows
        if rows == self.num_embeddings:
            return self.weight.rows(ids)
        is_here = (ids >= self.first_row) & (ids < self.first_row + rows)
        found = self.weight.rows(torch.where(is_here, ids - self.first_row, 0))
        return found * is_here[..., None].to(found.dtype)

    def extra_repr(self) -> str:
        """What print(model) says about it."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


def put_weight(model: nn.Module, path: str, weight: CodedWeight | CodedStack, owns: bool = True) -> None:
    """Replace a parameter of a model with coded matrices.

    An nn.Linear or nn.Embedding becomes an EntroLinear or EntroEmbedding; any other layer keeps its class.

    Args:
        model: the model.
        path: the parameter's name, such as `model.layers.0.mlp.up_proj.weight`.
        weight: what takes its place.
        owns: False for a matrix that is tied to another parameter's.
    Raises:
        UnsupportedError: the layer is an embedding with max_norm.
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


def _replacement(layer: nn.Module, weight: CodedWeight, owns: bool) -> EntroLinear | EntroEmbedding:
    if isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            raise UnsupportedError(
                f"{weight.name}: an embedding with max_norm changes its rows, and coded ones are fixed"
            )
        return EntroEmbedding(weight, layer.padding_idx, owns)
    assert isinstance(layer, nn.Linear)
    return EntroLinear(weight, layer.bias, owns)


def watch_inputs(model: nn.Module) -> None:
    """Watch the first calls of a model's linear layers, to join those that are given the same input."""
    ready: ReadyProducts[JoinedLayers] = ReadyProducts()
    for parent in model.modules():
        by_columns: dict[int, list[Layer]] = {}
        for layer in parent.children():
            if isinstance(layer, EntroLinear):
                by_columns.setdefault(layer.in_features, []).append(layer)
        for layers in by_columns.values():
            if len(layers) > 1:
                watch = Watch(layers, ready)
                for watched in layers:
                    watched.joining = watch
