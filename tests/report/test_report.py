"""Tables from results."""

import io

import pytest
from rich.console import Console

from entrollm.report import Column, QualityRow, Table, format_number, quality_table

TABLE = Table("sizes", (Column("model", "left"), Column("bits")), (("a|b [x]", "1.5"), ("c", "4")))


def rendered(table: Table) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table.to_rich())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_markdown_escapes_bars_and_aligns() -> None:
    assert TABLE.to_markdown() == "| model | bits |\n| --- | ---: |\n| a\\|b [x] | 1.5 |\n| c | 4 |\n"


def test_a_terminal_shows_cells_as_they_are() -> None:
    text = rendered(TABLE)
    assert "sizes" in text
    assert "a|b [x]" in text


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a table of 2 columns got a row of 1 cells"):
        Table("t", TABLE.columns, (("a",),))


def test_numbers() -> None:
    assert [format_number(value, 2) for value in (None, 1234.567, 0.0)] == ["-", "1,234.57", "0.00"]


def test_the_quality_table_leaves_out_what_no_row_has() -> None:
    rows = [
        QualityRow("bf16", size_bytes=31_500_000, bits_per_weight=16.0, perplexity=32.55),
        QualityRow("uint4 + Huffman", size_bytes=5_000_000, perplexity=40.0, kl_nats=0.2, top1_agreement=0.753),
    ]
    table = quality_table("tiny", rows)
    headings = [column.heading for column in table.columns]
    assert headings == ["model", "file size", "file bits/weight", "perplexity", "KL (nats)", "same top-1 (%)"]
    assert table.rows == (
        ("bf16", "31.5 MB", "16.000", "32.550", "-", "-"),
        ("uint4 + Huffman", "5 MB", "-", "40.000", "0.20000", "75.30"),
    )
    assert "uint4 + Huffman" in rendered(table)


def test_a_quality_table_without_rows_is_empty() -> None:
    assert quality_table("t", []).rows == ()
