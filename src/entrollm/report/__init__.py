"""Tables, plots and number formats for results."""

from entrollm.report.numbers import format_bytes, format_count, format_number, format_rate
from entrollm.report.page import ModelSection, render_page
from entrollm.report.quality import QualityRow, quality_table
from entrollm.report.rate_distortion import RatePoint, check_plotting, draw_rate_distortion, read_points
from entrollm.report.table import Column, Table

__all__ = [
    "Column",
    "ModelSection",
    "QualityRow",
    "RatePoint",
    "Table",
    "check_plotting",
    "draw_rate_distortion",
    "format_bytes",
    "format_count",
    "format_number",
    "format_rate",
    "quality_table",
    "read_points",
    "render_page",
]
