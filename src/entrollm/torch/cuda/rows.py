"""What layouts of matrices on a GPU keep about rows and columns, in the order in which rows are sorted."""

from __future__ import annotations

import torch
from torch import Tensor


def row_words(order: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Join the sorted rows' indices in the matrix, scales and offsets: int32, shape (rows, 3).

    Args:
        order: int64, shape (rows,), sorted rows.
        scale, offset: float32, shape (1,) or (rows,), on any device; `None` for an offset of 0.
    """
    scale = scale.to(order.device).expand(len(order))[order]
    offset = torch.zeros_like(scale) if offset is None else offset.to(order.device).expand(len(order))[order]
    return torch.stack([order.to(torch.int32), scale.view(torch.int32), offset.view(torch.int32)], -1)


def positions_of(order: Tensor) -> Tensor:
    """The position of each row after sorting: int32, shape (rows,)."""
    positions = torch.empty_like(order)
    positions[order] = torch.arange(len(order), device=order.device)
    return positions.to(torch.int32)


def padded_scales(column_scale: Tensor | None, device: torch.device) -> Tensor | None:
    """Scales of columns as kernels read them, four at a time; `None` if absent."""
    if column_scale is None:
        return None
    return torch.nn.functional.pad(column_scale.to(device), (0, -len(column_scale) % 4))
