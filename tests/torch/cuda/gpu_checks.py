"""What tests of matrices on GPUs share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


def with_scales(
    symbols: np.ndarray, scaled_columns: bool
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], np.ndarray]:
    """Symbols, scales, offsets and perhaps scales of columns on the GPU, and what they make in float64."""
    rows, columns = symbols.shape
    rng = np.random.default_rng(1)  # small weights, so that float16 outputs stay finite
    scale = rng.uniform(0.005, 0.02, rows).astype(np.float32)
    offset = rng.normal(0, 0.03, rows).astype(np.float32)
    column_scale = rng.uniform(0.5, 2.0, columns).astype(np.float32) if scaled_columns else None
    dense = symbols * scale[:, None].astype(np.float64) + offset[:, None]
    if column_scale is not None:
        dense = dense * column_scale
    symbols_, scale_, offset_ = (torch.from_numpy(x).cuda() for x in (symbols, scale, offset))
    return (symbols_, scale_, offset_, None if column_scale is None else torch.from_numpy(column_scale).cuda()), dense


def check_in_graph(chain: Callable[[], torch.Tensor]) -> None:
    """Kernels overlap in a graph; each must still see what the one before it wrote."""
    expected = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        y = chain()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
