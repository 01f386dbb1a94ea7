"""Quantize weights to integers on uniform grids; one method per module."""

from entrollm.quantize.paper import Granularity, Grid, Range, Scheme, make_grid, measure_range, quantize_rows
from entrollm.quantize.select import BitsOverride, TensorPlan, plan_tensors

__all__ = [
    "BitsOverride",
    "Granularity",
    "Grid",
    "Range",
    "Scheme",
    "TensorPlan",
    "make_grid",
    "measure_range",
    "plan_tensors",
    "quantize_rows",
]
