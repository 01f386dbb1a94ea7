"""Tables from results; sees only errors and specs."""

from entrollm.report.numbers import format_bytes, format_count, format_number, format_rate
from entrollm.report.quality import QualityRow, quality_table
from entrollm.report.table import Column, Table

__all__ = [
    "Column",
    "QualityRow",
    "Table",
    "format_bytes",
    "format_count",
    "format_number",
    "format_rate",
    "quality_table",
]
