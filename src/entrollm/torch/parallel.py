"""Tensor parallelism: each process holds its rows or columns of a coded matrix, coded anew with the same integers.

Transformers splits the activations and joins the products; layers here only multiply with their part. A part is cut out
at load: decoded, and coded again with the matrix's own code, so that weights are exactly those of one process.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from entrollm import _core
from entrollm.codec.blocks import choose_blocks
from entrollm.codec.encode import encode_symbols, row_chunks
from entrollm.errors import UnsupportedError
from entrollm.format import layout
from entrollm.format.group_scales import GroupedKind
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import TensorSpec
from entrollm.matrix import matrix_of
from entrollm.threads import default_threads
from entrollm.torch.backend import resting_place, to_tensor
from entrollm.torch.modules import EntroEmbedding, EntroLinear
from entrollm.torch.weight import CodedStack, CodedWeight

Range = tuple[int, int]
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
    """Load what this process holds of each coded matrix, by the model's plan.

    Args:
        model: with coded weights that have no entries yet.
        stored: the folder.
    Raises:
        UnsupportedError: the plan splits a matrix in a way that coded ones cannot follow.
        ValueError: a matrix cannot be split over so many processes.
    """
    plan = model._resolve_parallel_plans(model.config.distributed_config)[0]
    mesh = model._mesh_manager.get_mesh("tp")
    cutter = _Cutter(stored, mesh.get_local_rank(), mesh.size())
    layers = [
        (path, layer) for path, layer in model.named_modules() if not isinstance(layer, CodedStack | nn.ModuleList)
    ]
    for path, layer in layers:
        if not isinstance(layer, EntroLinear | EntroEmbedding):
            _load_children(layer, path, plan, cutter)
        elif not layer.is_tied:
            _load_layer(layer, plan.get(path), cutter)
    for path, layer in layers:
        # The owner of a tied matrix may hold another part: plans split heads by rows, and embeddings perhaps not.
        if isinstance(layer, EntroLinear | EntroEmbedding) and layer.is_tied:
            shared, style = layer.weight, plan.get(path)
            if cutter.axis(style) != cutter.axes[shared]:
                layer.own_weight(CodedWeight(shared.name, layer.full_spec, {}, shared.dtype, shared.device))
                _load_layer(layer, style, cutter)


def _load_children(layer: Any, path: str, plan: dict[str, str], cutter: _Cutter) -> None:
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
                    _check_whole(weight.name, plan.get(f"{path}.{name}"))
                if served is None or index in served:
                    cutter.fill(weight, None)
    for name, child in layer.named_children():
        if isinstance(child, CodedWeight):
            _check_whole(child.name, plan.get(f"{path}.{name}", plan.get(path)))
            cutter.fill(child, None)


def _load_layer(layer: EntroLinear | EntroEmbedding, style: str | None, cutter: _Cutter) -> None:
    if isinstance(layer, EntroEmbedding) and style in _ROWS:
        layer.first_row = cutter.part(layer.weight.name, layer.num_embeddings)[0]
    cutter.fill(layer.weight, style)


def _check_whole(name: str, style: str | None) -> None:
    if style not in _WHOLE:
        raise UnsupportedError(
            f"{name}: the plan splits it in the style {style!r}, which its kind of layer cannot follow"
        )


class _Cutter:
    """Cuts one process's parts out of stored matrices."""

    def __init__(self, stored: CompressedModel, rank: int, size: int) -> None:
        self._stored = stored
        self._rank = rank
        self._size = size
        self._pool = _core.ThreadPool(default_threads())
        self.axes: dict[CodedWeight, int | None] = {}

    def part(self, name: str, length: int) -> Range:
        """This process's range of an axis, as torch splits it."""
        step = -(-length // self._size)
        begin, end = self._rank * step, min(length, (self._rank + 1) * step)
        if begin >= end:
            raise ValueError(f"{name}: {length} cannot be split over {self._size} processes; use fewer")
        return begin, end

    def axis(self, style: str | None) -> int | None:
        """The axis that a style splits."""
        return 0 if style in _ROWS else 1 if style in _COLUMNS else None

    def fill(self, weight: CodedWeight, style: str | None) -> None:
        """Give a coded weight the entries of its part."""
        spec = self._stored.specs[weight.name]
        arrays = self._stored.entries(weight.name)
        axis = self.axes[weight] = self.axis(style)
        if axis is not None and isinstance(spec.kind, GroupedKind):
            raise UnsupportedError(
                f"{weight.name}: matrices with group scales are not split over processes; use device_map instead"
            )
        if axis is not None:
            rows = self.part(weight.name, spec.rows) if axis == 0 else (0, spec.rows)
            columns = self.part(weight.name, spec.columns) if axis == 1 else (0, spec.columns)
            spec, arrays = self._cut(weight.name, spec, rows, columns)
            weight.is_part = True
        elif style not in _WHOLE:
            raise UnsupportedError(
                f"{weight.name}: the plan splits it in the style {style!r}, which coded matrices cannot follow; "
                "pass a tp_plan that replicates it"
            )
        place = resting_place(weight.device)
        weight.fill(spec, {suffix: to_tensor(array).to(place) for suffix, array in arrays.items() if array.size})
        self._stored.release(weight.name)

    def _cut(
        self, name: str, spec: TensorSpec, rows: Range, columns: Range
    ) -> tuple[TensorSpec, dict[str, NDArray[Any]]]:
        arrays = self._stored.matrix_arrays(name)
        symbols = matrix_of(self._stored, name).symbols(*rows, self._pool)[:, slice(*columns)]
        shape = (rows[1] - rows[0], columns[1] - columns[0])
        blocks = choose_blocks(*shape)
        with ThreadPoolExecutor(self._pool.size) as executor:
            coded: dict[str, NDArray[Any]] = encode_symbols(
                np.ascontiguousarray(symbols),
                spec.code,
                blocks,
                row_chunks(*shape, blocks),
                executor,
                lambda done: None,
            )
        for suffix, axis in ((layout.SCALE, rows), (layout.OFFSET, rows), (layout.COLUMN_SCALE, columns)):
            if suffix in arrays:
                coded[suffix] = arrays[suffix] if arrays[suffix].size == 1 else arrays[suffix][slice(*axis)]
        return replace(spec, rows=shape[0], columns=shape[1], blocks=blocks, checksum=0, parts=None), coded


def mark_local(model: nn.Module) -> None:
    """Tell transformers that layers with coded matrices multiply with their part themselves."""
    for layer in model.modules():
        if isinstance(layer, EntroLinear | EntroEmbedding):
            setattr(layer, "_hf_quantized_needs_local_tp", True)  # noqa: B010 (no attribute of torch's)


def without_entries(stored: CompressedModel, name: str, dtype: torch.dtype) -> CodedWeight:
    """A coded weight whose entries are loaded by `load_parts`."""
    return CodedWeight(name, stored.specs[name], {}, dtype, torch.device("meta"))
