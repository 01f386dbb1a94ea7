"""A table of text, for terminals and for Markdown."""

from dataclasses import dataclass
from typing import Literal

import rich.table
from rich.text import Text

Align = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column's heading, and the side on which its cells align."""

    heading: str
    align: Align = "right"


@dataclass(frozen=True)
class Table:
    """A table of text; each row has one cell per column.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a table of {len(self.columns)} columns got a row of {len(row)} cells: {row}")

    def to_rich(self) -> rich.table.Table:
        """Return the table for a terminal; markup in cells is not interpreted."""
        table = rich.table.Table(title=Text(self.title), title_justify="left")
        for column in self.columns:
            table.add_column(Text(column.heading), justify=column.align)
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table

    def to_markdown(self) -> str:
        """Return the table as Markdown, without its title."""
        headings = tuple(column.heading for column in self.columns)
        rules = tuple("---:" if column.align == "right" else "---" for column in self.columns)
        lines = (headings, rules, *self.rows)
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
