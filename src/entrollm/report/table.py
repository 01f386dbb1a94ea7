"""A table of text, shown on a terminal or written as Markdown."""

from dataclasses import dataclass
from typing import Literal

import rich.table
from rich.text import Text

Align = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column's heading and the side to which its cells are set."""

    heading: str
    align: Align = "right"


@dataclass(frozen=True)
class Table:
    """A table of text; every row has a cell for each column.

    Raises:
        ValueError: a row has another number of cells.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a table of {len(self.columns)} columns got a row of {len(row)} cells: {row}")

    def to_rich(self) -> rich.table.Table:
        """Return the table for a terminal; cells are shown as they are, markup included."""
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
