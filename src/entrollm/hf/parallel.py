"""Tensor parallelism by the plans of transformers, which splits activations and joins products by itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from entrollm.errors import UnsupportedError
from entrollm.format.reader import CompressedModel
from entrollm.torch.layers import EntroEmbedding, EntroLinear
from entrollm.torch.parallel import Axis, PartCutter
from entrollm.torch.stack import CodedStack
from entrollm.torch.weight import CodedWeight

# Styles of transformers' plans, by what they split.
_ROWS = frozenset({"colwise", "colwise_gather_output", "colwise_rep", "embedding_rowwise"})
_COLUMNS = frozenset({"rowwise", "rowwise_split_input", "rowwise_rep", "embedding_colwise"})
_EXPERTS = "moe_tp_experts"
_WHOLE = frozenset({None, "replicate"})


def is_parallel(model: Any) -> bool:
    """Whether a model is loaded with tensor parallelism.

    Raises:
        UnsupportedError: it is loaded with another kind of parallelism.
    """
    config = getattr(model.config, "distributed_config", None)
    if config is None:
        return False
    for kind in ("pp", "ep", "dp"):
        if getattr(config, f"{kind}_size") > 1:
            raise UnsupportedError(f"coded models have no parallelism of the kind {kind}; use tp_size, or device_map")
    return bool(config.tp_size > 1)


def load_parts(model: Any, stored: CompressedModel) -> None:
    """Load this process's part of each coded matrix, as the model's plan says.

    Args:
        model: the model, whose coded weights have no entries yet.
        stored: the folder.
    Raises:
        UnsupportedError: the plan splits a matrix in a way that coded matrices do not support.
        ValueError: a matrix cannot be split over this number of processes.
    """
    plan = model._resolve_parallel_plans(model.config.distributed_config)[0]
    mesh = model._mesh_manager.get_mesh("tp")
    cutter = PartCutter(stored, mesh.get_local_rank(), mesh.size())
    layers = [
        (path, layer) for path, layer in model.named_modules() if not isinstance(layer, CodedStack | nn.ModuleList)
    ]
    axes: dict[CodedWeight, Axis] = {}
    for path, layer in layers:
        if not isinstance(layer, EntroLinear | EntroEmbedding):
            _load_children(layer, path, plan, cutter)
        elif not layer.is_tied:
            axes[layer.weight] = _load_layer(layer, plan.get(path), cutter)
    for path, layer in layers:
        # The owner of a tied matrix may hold another part: a plan may split the head by rows and the embedding not.
        if isinstance(layer, EntroLinear | EntroEmbedding) and layer.is_tied:
            shared, style = layer.weight, plan.get(path)
            if _split_axis(style) != axes.get(shared):
                layer.own_weight(CodedWeight(shared.name, layer.full_spec, {}, shared.dtype, shared.device))
                _load_layer(layer, style, cutter)


def _load_children(layer: Any, path: str, plan: dict[str, str], cutter: PartCutter) -> None:
    """Load the coded weights of a layer of another kind: experts are shared out, anything else is held whole."""
    stacks = {name: child for name, child in layer.named_children() if isinstance(child, CodedStack)}
    served = None
    if stacks and plan.get(path) == _EXPERTS:
        served = layer.served_experts = range(*cutter.part(path, layer.num_experts))
    for name, stack in stacks.items():
        for index in range(len(stack)):
            for weight in stack.parts(index):
                weight.is_part = served is not None
                if served is None:
                    check_whole(weight.name, plan.get(f"{path}.{name}"))
                if served is None or index in served:
                    cutter.fill(weight, None)
    for name, child in layer.named_children():
        if isinstance(child, CodedWeight):
            check_whole(child.name, plan.get(f"{path}.{name}", plan.get(path)))
            cutter.fill(child, None)


def _load_layer(layer: EntroLinear | EntroEmbedding, style: str | None, cutter: PartCutter) -> Axis:
    if isinstance(layer, EntroEmbedding) and style in _ROWS:
        layer.first_row = cutter.part(layer.weight.name, layer.num_embeddings)[0]
    axis = axis_of(layer.weight.name, style)
    cutter.fill(layer.weight, axis)
    return axis


def axis_of(name: str, style: str | None) -> Axis:
    """The axis of a matrix that a style splits.

    Raises:
        UnsupportedError: the style splits matrices in another way.
    """
    axis = _split_axis(style)
    if axis is None and style not in _WHOLE:
        raise UnsupportedError(
            f"{name}: the plan splits it in the style {style!r}, which coded matrices cannot follow; "
            "pass a tp_plan that replicates it"
        )
    return axis


def _split_axis(style: str | None) -> Axis:
    return 0 if style in _ROWS else 1 if style in _COLUMNS else None


def check_whole(name: str, style: str | None) -> None:
    """Check that a plan does not split a matrix whose layer needs all of it.

    Raises:
        UnsupportedError: it does.
    """
    if style not in _WHOLE:
        raise UnsupportedError(
            f"{name}: the plan splits it in the style {style!r}, which its kind of layer cannot follow"
        )


def mark_local(model: nn.Module) -> None:
    """Tell transformers that layers with coded matrices multiply with their part by themselves."""
    for layer in model.modules():
        if isinstance(layer, EntroLinear | EntroEmbedding):
            setattr(layer, "_hf_quantized_needs_local_tp", True)  # noqa: B010 (no attribute of torch's)
